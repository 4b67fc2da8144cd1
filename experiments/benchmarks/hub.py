"""The hub design of the published prototype, built from hivemind's own parts, as a baseline for `pipeline`.

One hivemind MoE server per stage; the trainer calls stage after stage through `RemoteExpert`, so every
activation and every gradient passes through it. Several threads keep several microbatches in flight.
Tensors travel as hivemind sends them unless told otherwise (float32), or with `--float16` in the smallest of
its codecs that decodes with present numpy.

    python -m experiments.benchmarks.hub RUN.yaml --stage 0                one server: its address
    python -m experiments.benchmarks.hub RUN.yaml --servers ADDRESS ...    the trainer: tokens/s
"""

import argparse
import os
import queue
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hivemind import DHT
from hivemind.moe import ModuleBackend, Server, get_experts
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import nn

from swarm.config import RunConfig, load_run
from swarm.model import build_stage


class LossStage(nn.Module):
    """The last stage with its loss: hidden [B, T, D] and targets [B, T] -> summed nats [B]."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = self.stage(x_BTD)
        losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
        return losses.view(targets_BT.shape).sum(1)


class EveryNth(torch.optim.AdamW):
    """Steps at every n-th call, as a step over the whole batch does; gradients add up meanwhile."""

    def __init__(self, parameters, every: int, **options: object) -> None:  # type: ignore[no-untyped-def]
        super().__init__(parameters, **options)  # type: ignore[arg-type]
        self._every, self._calls = every, 0

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        self._calls += 1
        if self._calls % self._every == 0:
            super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._calls % self._every == 0:
            super().zero_grad(set_to_none)


def serve(config: RunConfig, stage: int, compression: int) -> None:
    """Run one stage's server until standard input closes; prints its address."""
    torch.set_num_threads(1)
    training, last = config.training, stage == config.model.stages - 1
    module = build_stage(config.model, stage, seed=training.seed)
    tokens = BatchTensorDescriptor(training.sequence_tokens, dtype=torch.int64)
    hidden = BatchTensorDescriptor(training.sequence_tokens, config.model.width, compression=compression)
    backend = ModuleBackend(
        name=f"stage.{stage}",
        module=LossStage(module) if last else module,
        optimizer=EveryNth(
            module.parameters(),
            training.target_batch_tokens // training.microbatch_tokens,
            lr=training.optimizer.lr,
            foreach=True,
        ),
        args_schema=(tokens,) if stage == 0 else (hidden, tokens) if last else (hidden,),
        outputs_schema=BatchTensorDescriptor() if last else hidden,
        max_batch_size=training.microbatch_sequences,
    )
    dht = DHT(start=True)
    server = Server(dht, {backend.name: backend}, num_connection_handlers=2, device=torch.device("cpu"))
    server.run_in_background(await_ready=True)
    print(dht.get_visible_maddrs()[0], flush=True)
    sys.stdin.read()
    server.shutdown()


class HubTrainer:
    """Wires every microbatch through the servers from here, one call per hop."""

    def __init__(self, config: RunConfig, addresses: list[str]) -> None:
        self._config = config
        dht = DHT(initial_peers=addresses, start=True)
        names = [f"stage.{stage}" for stage in range(config.model.stages)]
        deadline_s = time.monotonic() + 60
        while None in (experts := get_experts(dht, names)):
            if time.monotonic() > deadline_s:
                raise SystemExit("the hub's servers did not announce themselves")
            time.sleep(0.5)
        self._experts, self.dht = experts, dht

    def microbatch(self, tokens_BT1: torch.Tensor) -> float:
        """Forward and backward of one microbatch through all stages; the summed loss."""
        inputs, targets = tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous()
        x = inputs
        for expert in self._experts[:-1]:
            x = expert(x)
        loss = self._experts[-1](x, targets).sum()
        loss.backward()
        return float(loss.detach())

    def tokens_per_s(self, seconds: float, in_flight: int) -> float:
        """Train with `in_flight` threads; tokens per second after the first round of microbatches."""
        training, model = self._config.training, self._config.model
        done: queue.Queue[float] = queue.Queue()
        ending = threading.Event()

        def work(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            shape = (training.microbatch_sequences, training.sequence_tokens + 1)
            while not ending.is_set():
                self.microbatch(torch.randint(0, model.vocabulary, shape, generator=generator))
                done.put(time.monotonic())

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(in_flight)]
        for thread in threads:
            thread.start()
        first = [done.get(timeout=300) for _ in range(in_flight)][-1]
        time.sleep(seconds)
        ending.set()
        count, last = 0, first
        while not done.empty():
            last, count = done.get(), count + 1
        for thread in threads:
            thread.join(60)
        return count * training.microbatch_tokens / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", type=int)
    parser.add_argument("--float16", action="store_true")
    parser.add_argument("--servers", nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    config = load_run(options.run)
    if options.stage is not None:
        serve(config, options.stage, CompressionType.FLOAT16 if options.float16 else CompressionType.NONE)
    else:
        trainer = HubTrainer(config, options.servers)
        print(trainer.tokens_per_s(options.seconds, config.pipeline.in_flight), flush=True)
        trainer.dht.shutdown()
        os._exit(0)  # hivemind's client threads do not end by themselves


if __name__ == "__main__":
    main()
