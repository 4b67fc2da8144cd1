"""The trainer: fills the pipeline with microbatches, evaluates now and then, reports the loss.

It owns no weights and never stops for a peer's failure: microbatches move to other peers, and when a
stage has none it waits. It ends when every stage has taken the run's steps.

Strict mode: exactly the target batch per step; the next step begins when this one is settled everywhere.

I/O: one event loop; data is read in a thread.
"""

import asyncio
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from averaging.network import Network
from swarm.config import RunConfig
from swarm.directory import Directory
from swarm.messages import pack_tokens
from trainers import events as ev
from trainers.pipeline import Pipeline

EVALUATION_S = 120.0  # an evaluation that takes longer is given up; the next one tries again
log = logging.getLogger(__name__)


class Trainer:
    """One trainer of one run."""

    def __init__(
        self,
        *,
        network: Network,
        directory: Directory,
        config: RunConfig,
        number: int,
        microbatches: Iterator[torch.Tensor],
        held_out: list[torch.Tensor],
        minutes: float | None = None,
    ) -> None:
        self._minutes = minutes
        self.config, self._microbatches, self._held_out = config, microbatches, held_out
        self.pipeline = Pipeline(
            network=network,
            directory=directory,
            config=config,
            rng=random.Random(config.training.seed * 1009 + number),
            on_completed=self._completed,
            on_abandoned=self._abandoned,
            on_recovered=self._recovered,
        )
        self.tokens, self._step = 0, 0
        self.finished = False
        self._losses: deque[tuple[int, float]] = deque(maxlen=256)  # (tokens, summed loss)
        self._evaluating: dict[bytes, ev.Completed | None] = {}
        self.evaluations: list[dict[str, float]] = []  # {"step", "tokens", "loss", "time_s"}
        self.recoveries: list[dict[str, Any]] = []
        self._began_s = time.monotonic()

    @property
    def step(self) -> int:
        """Steps that every stage has taken; a newcomer that is still behind takes none of them back."""
        self._step = max(self._step, self.pipeline.ledger.version)
        return self._step

    async def run(self) -> None:
        """Train until every stage has taken the run's steps."""
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self.pipeline.run())
            await self._wait_for_peers()
            await self._train()
            self.finished = True
            running.cancel()

    async def _wait_for_peers(self) -> None:
        stages, told_s = self.config.model.stages, time.monotonic()
        while self.pipeline.ready_stages < stages:
            await self._change()
            if time.monotonic() - told_s > 10:
                told_s = time.monotonic()
                log.info("waiting for peers: %d of %d stages have one", self.pipeline.ready_stages, stages)

    async def _train(self) -> None:
        training = self.config.training
        evaluating = asyncio.create_task(self._evaluate())
        evaluated_at = self.step
        await evaluating  # the initial loss belongs to the initial weights
        issue = self._issue_step if training.strict else self._issue_some
        while self.step < training.steps and not self._time_is_over():
            await issue()
            if self.step >= evaluated_at + training.eval_every and evaluating.done():
                evaluated_at = self.step - self.step % training.eval_every
                evaluating = asyncio.create_task(self._evaluate())
        await evaluating
        await self._evaluate()

    def _time_is_over(self) -> bool:
        return self._minutes is not None and time.monotonic() - self._began_s > 60 * self._minutes

    async def _issue_some(self) -> None:
        """Issue what the throttle admits, then wait for something to happen."""
        pipeline = self.pipeline
        ledger = pipeline.ledger
        while pipeline.throttle.admits(ledger.in_flight - len(self._evaluating), ledger.stuck):
            self._issue(next(self._microbatches), step=0)
            await asyncio.sleep(0)
        await self._change()

    async def _issue_step(self) -> None:
        """Strict: issue one whole step and wait until it is settled at every stage."""
        training, ledger = self.config.training, self.pipeline.ledger
        step = ledger.version
        for _ in range(training.target_batch_tokens // training.microbatch_tokens):
            while ledger.in_flight >= self.config.pipeline.in_flight:
                await self._change()
            self._issue(next(self._microbatches), step=step)
        while ledger.unsettled or ledger.version <= step:
            await self._change()

    def _issue(self, tokens_BT1: torch.Tensor, *, step: int, evaluate: bool = False) -> bytes:
        microbatch = uuid.uuid4().bytes
        if evaluate:
            self._evaluating[microbatch] = None
        self.pipeline.issue(
            microbatch, pack_tokens(tokens_BT1), sequences=len(tokens_BT1), evaluate=evaluate, step=step
        )
        return microbatch

    async def _change(self) -> None:
        self.pipeline.changed.clear()
        try:
            async with asyncio.timeout(0.5):
                await self.pipeline.changed.wait()
        except TimeoutError:
            pass  # look again: time itself may be what changed

    async def _evaluate(self) -> None:
        """Mean loss per token over the held-out microbatches, computed by the swarm."""
        version, began_s = self.step, time.monotonic()
        waiting = deque(self._held_out)
        issued: list[bytes] = []
        at_once = 2 * self.config.model.stages
        results: list[ev.Completed] = []
        while len(results) < len(self._held_out) and time.monotonic() - began_s < EVALUATION_S:
            while waiting and len(issued) < at_once:
                issued.append(self._issue(waiting.popleft(), step=version, evaluate=True))
            done = [m for m in issued if self._evaluating.get(m) is not None or m not in self._evaluating]
            for microbatch in done:
                issued.remove(microbatch)
                completed = self._evaluating.pop(microbatch, None)
                if completed is None:
                    return log.warning("an evaluation was given up")
                results.append(completed)
            if not done:
                await self._change()
        if len(results) < len(self._held_out):
            for microbatch in issued:
                self._evaluating.pop(microbatch, None)
            return log.warning("an evaluation took more than %.0f s and was given up", EVALUATION_S)
        loss = sum(r.loss for r in results) / sum(r.tokens for r in results)
        elapsed_s = round(time.monotonic() - self._began_s, 3)
        entry = {"step": version, "tokens": self.tokens, "loss": round(loss, 5), "time_s": elapsed_s}
        self.evaluations.append(entry)
        log.info("step %d, %d tokens: held-out loss %.4f", version, self.tokens, loss)

    def _completed(self, done: ev.Completed) -> None:
        if done.evaluate:
            if done.microbatch in self._evaluating:
                self._evaluating[done.microbatch] = done
        else:
            self.tokens += done.tokens
            self._losses.append((done.tokens, done.loss))

    def _abandoned(self, gone: ev.Abandoned) -> None:
        self._evaluating.pop(gone.microbatch, None)

    def _recovered(self, done: ev.Recovered) -> None:
        since_s = time.time() - time.monotonic()
        self.recoveries.append(
            {
                "peer": done.peer,
                "noticed": round(since_s + done.noticed_s, 4),
                "recovered": round(since_s + done.recovered_s, 4),
                "hops": done.hops,
            }
        )

    def metrics(self) -> Mapping[str, Any]:
        """Cumulative counters and the present state, by name."""
        training = self.config.training
        recent = list(self._losses)[-max(1, training.target_batch_tokens // training.microbatch_tokens) :]
        tokens = sum(t for t, _ in recent)
        ledger = self.pipeline.ledger
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": round(sum(loss for _, loss in recent) / tokens, 5) if tokens else None,
            "in_flight": ledger.in_flight,
            "limit": int(self.pipeline.throttle.limit),
            "counters": dict(ledger.counters),
            "evaluations": self.evaluations[-64:],
            "recoveries": self.recoveries[-64:],
            "finished": self.finished,
        }
