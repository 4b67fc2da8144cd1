"""Metrics: one table of names, and the sender that brings a process's values to the organizer.

Lower layers return values; only a process's shell sends them. Peers and trainers push their cumulative
counters and present state to the organizer once per period, best effort: when it is away they go on, and
the next push tells everything again.

I/O: `MetricsSender` only.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from averaging.errors import AveragingError
from averaging.network import Buffer, Calls, Frame, Network, PeerId, Stream, answer
from swarm import swarm_pb2 as pb

SERVICE = "metrics"
MAX_BYTES = 256 * 1024
MOST_PAUSE_S = 8.0  # between tries to reach an organizer that is away
Count = Annotated[int, Field(ge=0, lt=2**63)]
log = logging.getLogger(__name__)

# name in metrics.jsonl and W&B -> what it is; the dashboard draws these in this order
TABLE = {
    "loss/train_nats": "loss per token on the microbatches of the last step, nats",
    "loss/heldout_nats": "loss per token on held-out text, nats",
    "progress/steps": "optimizer steps that every stage has taken",
    "progress/tokens": "tokens whose gradient every stage has accumulated",
    "speed/tokens_per_s": "tokens per second over the last period",
    "speed/predicted_tokens_per_s": "what the devices of the weakest stage could compute",
    "pipeline/in_flight": "microbatches under way",
    "pipeline/rerouted_hops": "hops given to another peer, cumulative",
    "pipeline/staleness_steps": "steps that a gradient's weights are behind the step it counts in, mean",
    "swarm/peers": "peers that report",
    "swarm/kills": "peers killed by --chaos, cumulative",
    "wire/activation_bytes": "received by peers in forward pushes, cumulative",
    "wire/gradient_bytes": "received by peers in backward pushes, cumulative",
    "wire/averaging_bytes": "sent by peers in averaging, cumulative",
}


class PeerMetrics(BaseModel):
    """What a peer pushes; beside these fields any number of counters."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Count]
    kind: Literal["peer"]
    stage: Count
    version: Count
    queue: Count
    retained_bytes: Count
    tokens_per_s: float
    speed: float = Field(0.0, ge=0, le=1e18, description="multiply-adds per second while it computes")
    join_s: float = Field(0.0, ge=0, description="from asking for the state to the first microbatch")
    name: str = Field("", max_length=128)
    hash: str = Field("", pattern="^[0-9a-f]{0,16}$")


class Evaluation(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    step: Count
    tokens: Count
    loss: float
    time_s: float


class Recovery(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    peer: str = Field(max_length=128)
    noticed: float
    recovered: float
    hops: Count


class TrainerMetrics(BaseModel):
    """What a trainer pushes."""

    model_config = ConfigDict(allow_inf_nan=False)
    kind: Literal["trainer"]
    step: Count
    tokens: Count
    loss: float | None
    in_flight: Count
    limit: Count
    counters: dict[str, Count] = Field(max_length=64)
    evaluations: list[Evaluation] = Field(max_length=64)
    recoveries: list[Recovery] = Field(max_length=64)
    finished: bool


PUSH: TypeAdapter[PeerMetrics | TrainerMetrics] = TypeAdapter(
    Annotated[PeerMetrics | TrainerMetrics, Field(discriminator="kind")]
)


class MetricsSender:
    """Pushes this process's metrics to the organizer until cancelled."""

    def __init__(
        self, network: Network, organizer: PeerId, *, kind: str, values: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._calls = Calls(network, SERVICE, deadline_s=5.0)
        self._organizer, self._kind, self._values = organizer, kind, values

    async def run(self, period_s: float) -> None:
        pause_s = period_s
        while True:
            await asyncio.sleep(pause_s)
            pause_s = period_s if await self.send() else min(MOST_PAUSE_S, 2 * pause_s)

    async def send_last(self) -> None:
        """Push the final values; tried again if the organizer does not take them at once."""
        for pause_s in (1.0, 3.0):
            if await self.send():
                return
            await asyncio.sleep(pause_s)
        await self.send()

    async def send(self) -> bool:
        """Push the present values once; False if the organizer did not take them."""
        text = json.dumps({"kind": self._kind, **self._values()})
        try:
            await self._calls.call(self._organizer, pb.Metrics(json=text.encode()).SerializeToString())
            return True
        except AveragingError as error:
            log.debug("metrics: %s", error)
            return False


async def serve_metrics(network: Network, take: Callable[[PeerId, dict[str, Any]], None]) -> None:
    """Receive what `MetricsSender`s push; malformed pushes are ignored."""

    async def respond(sender: PeerId, frame: Frame) -> tuple[bytes, Buffer]:
        try:
            message = pb.Metrics.FromString(frame.header[:MAX_BYTES])
            take(sender, PUSH.validate_json(message.json).model_dump())
        except (ValueError, DecodeError) as error:  # pydantic's errors are ValueErrors, too
            log.info("metrics of %s are ignored: %s", sender[-8:], error)
        return b"", b""

    async def serve(stream: Stream) -> None:
        await answer(stream, respond)

    await network.serve(SERVICE, serve)
