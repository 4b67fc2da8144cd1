"""The layout is the architecture: imports point one way, pure modules stay pure, nobody unpickles."""

import ast
import gc
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = {"averaging": 0, "swarm": 1, "trainers": 2, "experiments": 3, "tests": 3}
PURE = [
    "averaging/plan.py", "averaging/grid.py", "averaging/shares.py", "averaging/reduce.py",
    "averaging/round.py", "averaging/repair.py", "averaging/wire.py",
    "swarm/records.py", "swarm/wiring.py",
    "swarm/partition.py", "swarm/assignment.py", "swarm/prediction.py",
    "trainers/ledger.py", "trainers/routes.py",
    "trainers/simulation/trace.py", "trainers/simulation/optimum.py", "trainers/simulation/fleet.py",
    "trainers/simulation/links.py", "trainers/simulation/server.py", "trainers/simulation/steps.py",
    "trainers/simulation/feeder.py", "trainers/simulation/world.py", "trainers/simulation/run.py",
    "trainers/assembly.py", "trainers/throttle.py", "trainers/flight.py", "trainers/evidence.py",
    "trainers/events.py",
]  # fmt: skip
IMPURE_MODULES = {"asyncio", "time", "threading", "socket", "subprocess", "os", "hivemind", "wandb"}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}


def sources(*folders: str) -> list[Path]:
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py")) if "_pb2" not in p.name]


def imports(path: Path) -> set[str]:
    found = set()
    gc.disable()  # a collection in the middle of ast.parse makes it fail on Python 3.11
    try:
        tree = ast.parse(path.read_text())
    finally:
        gc.enable()
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            found |= {alias.name.split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            found.add(item.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sources("averaging", "swarm", "trainers"), ids=str)
def test_imports_point_one_way(path):
    layer = path.relative_to(ROOT).parts[0]
    later = {name for name in imports(path) if ORDER.get(name, -1) > ORDER[layer]}
    assert not later, f"{path} imports {later}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_no_network_clock_process_or_thread(name):
    assert not imports(ROOT / name) & IMPURE_MODULES


@pytest.mark.parametrize("path", sources("averaging", "swarm", "trainers", "experiments"), ids=str)
def test_nobody_unpickles(path):
    assert not imports(path) & UNSAFE_MODULES
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(call), f"{path}:{call.lineno}"


def test_generated_messages_are_up_to_date(tmp_path):
    from grpc_tools import protoc

    protos = ["averaging/averaging.proto", "swarm/swarm.proto"]
    assert protoc.main(["protoc", f"-I{ROOT}", f"--python_out={tmp_path}", *protos]) == 0
    for proto in protos:
        generated = proto.replace(".proto", "_pb2.py")
        assert (tmp_path / generated).read_text() == (ROOT / generated).read_text(), (
            f"run `make messages`: {proto}"
        )
