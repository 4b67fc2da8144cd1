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
from typing import Any

from averaging.errors import AveragingError
from averaging.network import Buffer, Calls, Frame, Network, PeerId, Stream, answer
from swarm import swarm_pb2 as pb

SERVICE = "metrics"
MAX_BYTES = 256 * 1024
log = logging.getLogger(__name__)

# name in metrics.jsonl and W&B -> what it is; the dashboard draws these in this order
TABLE = {
    "loss/train_nats": "loss per token on the microbatches of the last step, nats",
    "loss/heldout_nats": "loss per token on held-out text, nats",
    "progress/steps": "optimizer steps that every stage has taken",
    "progress/tokens": "tokens whose gradient every stage has accumulated",
    "speed/tokens_per_s": "tokens per second over the last period",
    "pipeline/in_flight": "microbatches under way",
    "pipeline/rerouted_hops": "hops given to another peer, cumulative",
    "swarm/peers": "peers that report",
    "swarm/kills": "peers killed by --chaos, cumulative",
    "wire/activation_bytes": "received by peers in forward pushes, cumulative",
    "wire/gradient_bytes": "received by peers in backward pushes, cumulative",
    "wire/averaging_bytes": "sent by peers in averaging, cumulative",
}


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
            pause_s = period_s if await self.send() else min(30.0, 2 * pause_s)

    async def send(self, **more: Any) -> bool:
        """Push the present values once; False if the organizer did not take them."""
        text = json.dumps({"kind": self._kind, **self._values(), **more})
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
            values = json.loads(message.json)
        except (ValueError, RecursionError):  # protobuf's DecodeError is a ValueError, too
            return b"", b""
        if isinstance(values, dict) and values.get("kind") in ("peer", "trainer"):
            take(sender, values)
        return b"", b""

    async def serve(stream: Stream) -> None:
        await answer(stream, respond)

    await network.serve(SERVICE, serve)
