import copy
import gc
import subprocess
import sys
import weakref
from itertools import combinations, pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from averaging.plan import Pass
from swarm.config import parse_run
from swarm.errors import ConfigError
from swarm.model import build_stage
from swarm.model.llama import layer_costs
from swarm.optimizer import learning_rate
from swarm.partition import partition
from swarm.stage import Stage
from swarm.tensors import tensors_in
from swarm.weights import SMALL_VALUES


def config(*overrides: str):
    text = "name: x\nmodel: {width: 32, layers: 5, heads: 2, vocabulary: 50, stages: 3}\n"
    return parse_run(text, source="f", overrides=list(overrides))


def make_stages(run, stages=None):
    count = stages or run.model.stages
    model = run.model.model_copy(update={"stages": count})
    return [Stage(build_stage(model, i, seed=7), run.training, stage=i, stages=count) for i in range(count)]


def tokens(seed=0, batch=2, length=9):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_the_model_computes_the_same_however_it_is_cut(stages):
    run = config()
    whole, parts = make_stages(run, 1), make_stages(run, stages)
    x = expected = tokens()
    with torch.no_grad():
        expected = whole[0].module(expected)
        for part in parts:
            x = part.module(x)
    assert torch.equal(x, expected)


def test_initial_parameters_do_not_depend_on_the_cut_or_the_process():
    run = config()
    whole = dict(make_stages(run, 1)[0].module.named_parameters())
    parts = {n: p for s in make_stages(run, 3) for n, p in s.module.named_parameters()}
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def test_a_newcomer_learns_what_stages_cost_without_making_torch_import_its_python_kernels():
    program = """
import sys
from swarm.config import parse_run
from swarm.model import build_stage, stage_costs
model = parse_run("name: x\\nmodel: {width: 32, layers: 5, heads: 2, stages: 3}", source="f").model
build_stage(model, 0, seed=0)
before = set(sys.modules)
assert stage_costs(model)[2] > 0
print(len(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10, "its event loop would stop for seconds, and all who call it"


def test_parameter_names_are_those_of_hugging_faces_llama():
    names = {n for n, _ in make_stages(config(), 1)[0].module.named_parameters()}
    layer = {
        f"model.layers.0.{part}.weight"
        for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
        )
    }  # fmt: skip
    assert layer | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert len(names) == 5 * 9 + 3


def test_gradients_through_stages_equal_those_of_the_whole_model():
    run, batch = config(), tokens(3)
    whole, parts = make_stages(run, 1)[0], make_stages(run, 3)
    _, expected, _ = whole.loss_backward(batch[:, :-1], batch[:, 1:])
    a, graph_a = parts[0].forward(batch[:, :-1], keep_graph=True)
    b, graph_b = parts[1].forward(a, keep_graph=True)
    _, last, grad_b = parts[2].loss_backward(b, batch[:, 1:])
    middle, grad_a = parts[1].backward(graph_b, grad_b)
    first, nothing = parts[0].backward(graph_a, grad_a)
    assert nothing is None
    by_name = dict(zip([n for n, _ in whole.module.named_parameters()], expected, strict=True))
    for stage, gradients in zip(parts, (first, middle, last), strict=True):
        for (name, _), gradient in zip(stage.module.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, by_name[name], rtol=1e-4, atol=1e-6)


def test_a_graph_kept_over_a_step_runs_backward_with_its_own_weights():
    run = config()
    stage = make_stages(run, 3)[1]
    x = torch.randn(2, 8, 32)
    _, graph = stage.forward(x.clone(), keep_graph=True)
    expected, _ = copy.deepcopy(stage).backward(
        stage.forward(x.clone(), keep_graph=True)[1], torch.ones(2, 8, 32)
    )
    stage.apply(torch.randn(stage.values))
    gradients, _ = stage.backward(graph, torch.ones(2, 8, 32))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_state_moves_to_another_stage_bit_by_bit_and_trains_on_alike():
    run = config()
    donor, newcomer = make_stages(run, 3)[1], make_stages(run, 3)[1]
    for seed in range(3):
        donor.apply(torch.randn(donor.values, generator=torch.Generator().manual_seed(seed)))
    newcomer.load(copy.deepcopy(donor.state()), donor.version)
    assert newcomer.hash() == donor.hash()
    for stage in (donor, newcomer):
        stage.apply(torch.ones(stage.values))
    assert newcomer.hash() == donor.hash() and newcomer.version == 4


def test_a_state_is_loaded_where_it_lies_and_its_memory_is_free_after_a_step():
    donor, newcomer, other = (make_stages(config(), 3)[1] for _ in range(3))
    donor.apply(torch.ones(donor.values))
    data = donor.snapshot().joined()
    held = weakref.ref(memory := np.frombuffer(data, np.uint8).copy())
    newcomer.load(tensors_in(memory.data), donor.version)
    first, end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
    vectors = newcomer._vectors().values()
    assert all(first <= vector.data_ptr() < end for vector in vectors), "nothing was copied"
    del memory, vectors
    other.load(safetensors.torch.load(bytes(data)), donor.version)  # every tensor somewhere else
    donor.apply(torch.ones(donor.values))
    for stage in (newcomer, other):
        stage.replay(torch.ones(stage.values), ())
    assert held() is not None
    for stage in (donor, newcomer, other):
        stage.apply(torch.ones(stage.values))
    assert donor.snapshot().joined() == newcomer.snapshot().joined() == other.snapshot().joined()
    gc.collect()
    assert held() is None


def test_a_graph_kept_over_a_step_that_is_replayed_on_a_loaded_state_runs_backward():
    donor, newcomer, other = (make_stages(config(), 3)[1] for _ in range(3))
    donor.apply(torch.ones(donor.values))
    newcomer.load(tensors_in(donor.snapshot().joined()), donor.version)
    other.load(copy.deepcopy(donor.state()), donor.version)
    x, gradients = torch.randn(2, 8, 32), []
    for stage in (newcomer, other):
        _, graph = stage.forward(x.clone(), keep_graph=True)
        stage.replay(torch.ones(stage.values), ())
        gradients.append(stage.backward(graph, torch.ones(2, 8, 32))[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_parameters_that_lie_apart_in_one_memory_are_taken_as_they_are():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            memory = torch.arange(12.0)
            self.first, self.second = nn.Parameter(memory[:4]), nn.Parameter(memory[4::2])

    stage = Stage(Strided(), config().training, stage=0, stages=1)
    assert stage._weights.vector.tolist() == [0, 1, 2, 3, 4, 6, 8, 10]


def test_a_gradient_of_another_shape_is_refused():
    stage = make_stages(config(), 3)[1]
    _, graph = stage.forward(torch.randn(2, 8, 32), keep_graph=True)
    with pytest.raises(ValueError, match=r"\(3, 2, 8, 32\) of an output \(2, 8, 32\)"):
        stage.backward(graph, torch.ones(3, 2, 8, 32))


def test_a_snapshot_stays_what_it_was_while_somebody_has_it_and_costs_nothing_after():
    stage = make_stages(config(), 3)[1]
    stage.apply(torch.ones(stage.values))
    snapshot, copied = stage.snapshot(), stage.snapshot().joined()
    where = stage._optimizer.first.data_ptr()
    places = [torch.frombuffer(part, dtype=torch.uint8).data_ptr() for part in snapshot._parts[1:]]
    assert where in places, "it is the stage's own memory"
    for _ in range(2):
        stage.apply(torch.ones(stage.values))
    assert snapshot.joined() == copied != stage.snapshot().joined()
    assert stage._optimizer.first.data_ptr() != where
    del snapshot
    where = stage._optimizer.first.data_ptr()
    stage.apply(torch.ones(stage.values))
    assert stage._optimizer.first.data_ptr() == where


def test_a_state_that_does_not_fit_changes_nothing():
    run = config()
    stage, other = make_stages(run, 3)[1], make_stages(run, 3)[0]
    before = stage.hash()
    with pytest.raises(ValueError, match="names differ"):
        stage.load(other.state(), 5)
    wrong = stage.state()
    name = next(iter(wrong))
    wrong[name] = torch.zeros(1)
    with pytest.raises(ValueError, match="is not"):
        stage.load(wrong, 5)
    assert stage.hash() == before and stage.version == 0


def test_mean_is_per_token_and_freeze_begins_a_new_sum():
    stage = make_stages(config(), 3)[1]
    ones = [torch.ones_like(p) for p in stage.module.parameters()]
    stage.accumulate(b"a", ones, 3)
    stage.accumulate(b"b", ones, 1)
    frozen = stage.freeze()
    assert torch.equal(stage.mean(frozen), torch.full((stage.values,), 0.5))
    assert frozen.microbatches == [b"a", b"b"] and frozen.step == 0
    assert stage.accumulator.step == 1 and stage.accumulator.tokens == 0


def test_small_tensors_come_last_in_a_gradient():
    stage = make_stages(config("model.width=128"))[0]
    sizes = [shape.numel() for shape in stage.shapes]
    small = [size for size in sizes if size <= SMALL_VALUES]
    assert sizes[-len(small) :] == small and len(small) < len(sizes)
    assert stage.gradient == Pass(sum(sizes), sum(small))
    for number, held in enumerate(stage.accumulator.sums):
        held.fill_(number)
    stage.accumulator.tokens = 1
    expected = torch.cat([torch.full((size,), float(number)) for number, size in enumerate(sizes)])
    assert torch.equal(stage.mean(stage.freeze()), expected)


def test_learning_rate_warms_up_and_decays():
    optimizer = config("training.optimizer.warmup_steps=10").training.optimizer
    rates = [learning_rate(optimizer, step, 100) for step in range(120)]
    assert rates[9] == optimizer.lr and rates[0] == optimizer.lr / 10
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[100] == pytest.approx(optimizer.lr * optimizer.final_lr)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
def test_partition_is_the_best_of_all(stages):
    costs = [5.0, 1, 1, 1, 4, 2, 3]
    cut = partition(costs, stages)
    assert [i for part in cut for i in part] == list(range(7)) and all(len(p) for p in cut)
    worst = max(sum(costs[i] for i in part) for part in cut)
    edges = [(0, *c, 7) for c in combinations(range(1, 7), stages - 1)]
    assert worst == min(max(sum(costs[a:b]) for a, b in pairwise(e)) for e in edges)


def test_layer_costs_count_the_head_with_the_last_layer():
    costs = layer_costs(config().model)
    assert costs[-1] > costs[0] and len(set(costs[:-1])) == 1


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2).bfloat16()), "parameter 1.weight is torch.bfloat16"),
        (nn.ReLU(), "a stage without trainable parameters"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused_by_name(module, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Stage(module, config().training, stage=0, stages=1)


def test_a_first_microbatch_imports_no_computer_algebra():
    """Torch does, half a second of it, to compare the shape of a gradient that it is given."""
    first = (
        "import sys, torch; from tests.test_stage import config, make_stages;"
        "make_stages(config())[0].warm_up(torch.zeros(1, 8, dtype=torch.int64));"
        "sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", first], check=False, timeout=60).returncode == 0
