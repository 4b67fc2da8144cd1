import subprocess
import sys
from typing import get_args

import pytest

from averaging.codecs import CODECS
from swarm.config import FINE, AveragingCodec, RunConfig, dump_run, load_run, parse_run
from swarm.errors import ConfigError


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(text, source="run.yaml", overrides=list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_mistyped_key_names_file_line_key_and_nearest():
    message = complaint("name: x\nmodel:\n  widht: 64\n")
    assert message == "run.yaml:3: unknown key 'model.widht'; did you mean 'width'?"


def test_unknown_section_names_the_nearest_one():
    assert "did you mean 'training'" in complaint("name: x\ntrainign: {}\n")


def test_unknown_key_of_a_nested_section_is_found_where_it_stands():
    message = complaint("name: x\ntraining:\n  optimizer:\n    lr: 0.1\n    betta1: 0.9\n")
    assert message.startswith("run.yaml:5:") and "beta1" in message


def test_wrong_type_names_the_value():
    message = complaint("name: x\nmodel: {width: wide}\n")
    assert message.startswith("run.yaml:2: model.width:") and "'wide'" in message


def test_missing_name_says_so():
    assert complaint("model: {}\n") == "run.yaml: key 'name' is missing"


def test_broken_yaml_names_the_line():
    assert complaint("name: x\nmodel: [1,\n").startswith("run.yaml:3: not valid YAML")


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(text):
    assert "mapping" in complaint(text)


@pytest.mark.parametrize(
    "section, says",
    [
        ("model: {width: 10, heads: 4}", "heads"),
        ("model: {layers: 2, stages: 3}", "cut into 3 stages"),
        ("training: {strict: true}", "delayed_updates"),
        ("local: {peers_per_stage: [1, 2]}", "one positive number per stage"),
        ("local: {peers_per_stage: 0}", "one positive number per stage"),
        ("data: {source: text}", "needs `path`"),
        ("averaging: {group_size: 1}", "group_size"),
        ("averaging: {rank: 4}", "rank 4 needs codec float16, bfloat16 or float32, not int8"),
        ("pipeline: {codec: int7}", "codec"),
    ],
)
def test_values_that_cannot_work_together_are_one_clear_line(section, says):
    assert says in complaint(f"name: x\n{section}\n")


def test_overrides_are_checked_like_the_file():
    run = parse_run("name: x\n", source="f", overrides=["model.width=128", "training.optimizer.lr=0.5"])
    assert run.model.width == 128 and run.training.optimizer.lr == 0.5
    assert complaint("name: x\n", "model.widht=3").startswith("--set model.widht=3: unknown key")
    assert "section.key=value" in complaint("name: x\n", "model.width")


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_run(tmp_path / "nowhere.yaml")


def test_resolved_config_parses_to_itself():
    run = parse_run("name: x\nlocal: {}\n", source="f")
    assert parse_run(dump_run(run), source="again") == run


def test_every_field_is_described():
    def undescribed(section, path=""):
        for name, info in section.model_fields.items():
            inner = [
                t
                for t in (info.annotation, *getattr(info.annotation, "__args__", ()))
                if hasattr(t, "model_fields")
            ]
            if inner:
                yield from undescribed(inner[0], f"{path}{name}.")
            elif not info.description and name not in {"beta1", "beta2", "eps", "weight_decay"}:
                yield path + name

    assert not list(undescribed(RunConfig))


def test_the_codecs_of_a_run_file_are_those_that_there_are():
    assert set(get_args(AveragingCodec)) == CODECS.keys()
    assert {name for name, codec in CODECS.items() if not codec.lossy} == FINE


def test_a_mistake_is_told_without_waiting_for_torch():
    program = "import sys, trainers.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
