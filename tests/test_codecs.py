import pytest
import torch

from averaging.codecs import CODECS, INT8_BLOCK, codec_by_number
from averaging.errors import CodecError
from averaging.feedback import Feedback
from averaging.plan import Pass, Report, StepRules, make_plan
from averaging.round import first_round
from averaging.shares import Slice

RELATIVE_ERROR = {"float32": 0.0, "float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2, "int4": 0.15, "topk": 0.95}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (INT8_BLOCK,), (2, INT8_BLOCK + 1), (4, 32, 64)])
def test_decoding_gives_back_the_tensor_within_the_codecs_precision(name, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    codec = CODECS[name]
    decoded = codec.decode(codec.encode(tensor), shape)
    assert decoded.dtype == torch.float32 and decoded.shape == tensor.shape
    assert (decoded - tensor).norm() <= RELATIVE_ERROR[name] * tensor.norm()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("values", [0, 1, 511, 512, 513, 10_000])
def test_size_is_known_before_encoding(name, values):
    assert len(CODECS[name].encode(torch.ones(values))) == CODECS[name].size_bytes(values)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(name, bad):
    if name == "float16" and bad == bad:
        pytest.skip("float16 saturates infinities: what it sends is finite")
    tensor = torch.ones(1000)
    tensor[700] = bad
    with pytest.raises(CodecError, match="not finite"):
        CODECS[name].decode(CODECS[name].encode(tensor), (1000,))


@pytest.mark.parametrize("name", CODECS)
def test_bytes_of_another_length_are_refused(name):
    data = bytes(CODECS[name].encode(torch.ones(100)))
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(CodecError, match="takes"):
            CODECS[name].decode(wrong, (100,))


@pytest.mark.parametrize("name", CODECS)
def test_finite_extremes_survive(name):
    tensor = torch.tensor([0.0, 1e-30, -1e30, 3e38])
    decoded = CODECS[name].decode(CODECS[name].encode(tensor), (4,))
    assert torch.isfinite(decoded).all()


def test_int8_error_is_at_most_half_a_step_of_its_block():
    tensor = torch.randn(8, INT8_BLOCK) * torch.logspace(-6, 6, 8).unsqueeze(1)
    codec = CODECS["int8"]
    decoded = codec.decode(codec.encode(tensor), tensor.shape)
    step = tensor.abs().amax(1, keepdim=True) / 127
    assert ((decoded - tensor).abs() <= 0.5001 * step).all()


def test_int8_costs_at_most_1_02_bytes_per_value():
    assert CODECS["int8"].size_bytes(1 << 20) / (1 << 20) <= 1.02


def test_unknown_codec_number_is_refused():
    with pytest.raises(CodecError, match="unknown codec"):
        codec_by_number(99)


def test_int4_costs_at_most_0_54_bytes_per_value():
    assert CODECS["int4"].size_bytes(1 << 20) / (1 << 20) <= 0.54


def residual_of(codec, values):
    reports = {"a": Report(1.0, bytes(8), (Pass(values),))}
    rules = StepRules(target=1, max_weight=1, codec=codec.name)
    plan = make_plan(step=0, coordinator="a", reports=reports, nonce=b"n", rules=rules)
    return Feedback().of(first_round(plan, "a", 0, rules=rules))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.lossy])
def test_with_feedback_the_running_mean_of_what_a_lossy_codec_delivers_is_the_true_one(seed, name):
    generator, codec = torch.Generator().manual_seed(seed), CODECS[name]
    start, values, steps = 2 * INT8_BLOCK, 1000, 400
    drawn = torch.randn(steps, values, generator=generator) * torch.rand(values, generator=generator) ** 4
    weights = torch.rand(steps, generator=generator) + 0.5
    residual, delivered = residual_of(codec, start + values), torch.zeros(values)
    for step, weight in zip(drawn, weights.tolist(), strict=True):
        encoded = residual.encode(codec, step, Slice(start, start + values), weight)
        delivered += weight * codec.decode(encoded, (values,))
    alone = sum(
        w * codec.decode(codec.encode(step), (values,)) for step, w in zip(drawn, weights, strict=True)
    )
    true = weights @ drawn
    # What is missing stays bounded, however many steps: top-k speaks of a value every 32 steps or so.
    missing = (delivered - true).abs().max()
    assert missing <= (20 if name == "topk" else 1), missing
    assert (delivered - true).norm() < 0.2 * (alone - true).norm()


def test_feedback_forgets_what_is_not_finite():
    for codec in (codec for codec in CODECS.values() if codec.lossy):
        residual, part = residual_of(codec, 200), Slice(0, 200)
        residual.encode(codec, torch.full((200,), float("nan")), part, 1.0)
        assert bytes(residual.encode(codec, torch.ones(200), part, 1.0)) == bytes(
            codec.encode(torch.ones(200))
        )


def test_topk_keeps_the_largest_of_every_block_and_costs_a_tenth_of_a_byte_per_value():
    codec, tensor = CODECS["topk"], torch.zeros(1000)
    tensor[torch.arange(0, 1000, 40)] = torch.linspace(-3, 3, 25)
    assert torch.allclose(codec.decode(codec.encode(tensor), (1000,)), tensor, rtol=4e-3)
    assert codec.size_bytes(1 << 20) / (1 << 20) < 0.1


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_small_values_beside_large_ones_arrive_in_the_long_run(name):
    codec, part = CODECS[name], Slice(0, INT8_BLOCK)
    values = torch.full((INT8_BLOCK,), 0.02 / 7)
    values[::128] = 1.0
    residual = residual_of(codec, INT8_BLOCK)
    total = sum(codec.decode(residual.encode(codec, values, part, 1.0), (INT8_BLOCK,)) for _ in range(1000))
    assert codec.decode(codec.encode(values), (INT8_BLOCK,))[1] == 0, "alone they never do"
    assert (total / 1000 - values).abs().max() < 2e-4
