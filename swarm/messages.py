"""What travels between trainers and peers, as validated frozen records.

Bytes from strangers are parsed here and nowhere else: a record that exists is well-formed and bounded;
everything else raises `RejectedError` with the sender's name.

Pure.
"""

from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from averaging.codecs import Codec, codec_by_number
from averaging.errors import CodecError
from averaging.network import PeerId
from swarm import swarm_pb2 as pb
from swarm.errors import RejectedError

MAX_STAGES = 1024
MAX_VALUES = 1 << 28  # of one tensor: a GiB of float32
ID_BYTES, SESSION_BYTES = 16, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a microbatch goes; of two routes the one with the higher attempt holds."""

    microbatch: bytes
    session: bytes
    trainer: PeerId
    attempt: int
    peers: tuple[PeerId, ...]
    forward_until: int
    backward_until: int
    accumulated: tuple[int, ...] = ()  # stages that must not accumulate it (again)
    evaluate: bool = False
    step: int = 0

    def pack(self) -> pb.Route:
        return pb.Route(
            microbatch=self.microbatch,
            session=self.session,
            trainer=self.trainer,
            attempt=self.attempt,
            peers=self.peers,
            forward_until=self.forward_until,
            backward_until=self.backward_until,
            accumulated=self.accumulated,
            mode=pb.EVALUATE if self.evaluate else pb.TRAIN,
            step=self.step,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """One tensor for one hop: the header of it; the payload travels beside it."""

    route: Route
    stage: int
    backward: bool
    codec: Codec
    shape: tuple[int, ...]
    tokens: bytes  # int32 [sequences, T + 1]
    sequences: int

    def pack(self) -> bytes:
        push = pb.Push(
            route=self.route.pack(),
            stage=self.stage,
            direction=pb.BACKWARD if self.backward else pb.FORWARD,
            codec=self.codec.number,
            shape=self.shape,
            tokens=self.tokens,
            sequences=self.sequences,
        )
        return pb.HopRequest(push=push).SerializeToString()

    @property
    def token_count(self) -> int:
        """Tokens that are predicted: sequences x T."""
        return len(self.tokens) // 4 - self.sequences

    def token_ids(self) -> torch.Tensor:
        """[B, T + 1] int64."""
        flat = torch.frombuffer(bytearray(self.tokens), dtype=torch.int32)
        return flat.view(self.sequences, -1).to(torch.int64)


def pack_tokens(tokens_BT1: torch.Tensor) -> bytes:
    """Token ids [B, T + 1] of any integer type as int32 bytes."""
    return tokens_BT1.to(torch.int32).contiguous().numpy().tobytes()


def parse_hop_request(sender: PeerId, data: bytes) -> pb.HopRequest:
    """Parse the header of a hop request. Raises RejectedError."""
    try:
        return pb.HopRequest.FromString(data)
    except DecodeError:
        raise RejectedError(sender, "malformed request") from None


def parse_route(sender: PeerId, route: pb.Route) -> Route:
    """Validate a route. Raises RejectedError."""
    _require(len(route.microbatch) == ID_BYTES, sender, "microbatch id is not 16 bytes")
    _require(len(route.session) == SESSION_BYTES, sender, "session is not 8 bytes")
    _require(1 <= len(route.peers) <= MAX_STAGES, sender, f"route of {len(route.peers)} peers")
    _require(max(len(p) for p in (*route.peers, route.trainer)) <= 128, sender, "peer id too long")
    return Route(
        microbatch=route.microbatch,
        session=route.session,
        trainer=route.trainer,
        attempt=route.attempt,
        peers=tuple(route.peers),
        forward_until=route.forward_until,
        backward_until=route.backward_until,
        accumulated=tuple(route.accumulated[:MAX_STAGES]),
        evaluate=route.mode == pb.EVALUATE,
        step=route.step,
    )


def parse_push(sender: PeerId, push: pb.Push, *, vocabulary: int) -> Push:
    """Validate a push header: sizes, token ids, and that its route leads from the sender to here.

    Raises RejectedError.
    """
    route = parse_route(sender, push.route)
    backward = push.direction == pb.BACKWARD
    _require(push.stage < len(route.peers), sender, f"stage {push.stage} of {len(route.peers)}")
    came_from = push.stage + 1 if backward else push.stage - 1
    expected = route.trainer if came_from < 0 else dict(enumerate(route.peers)).get(came_from)
    _require(sender == expected, sender, "its own route does not lead through it")
    values = 1
    for size in push.shape:
        _require(0 < size <= MAX_VALUES, sender, f"shape {list(push.shape)}")
        values *= size
        _require(values <= MAX_VALUES, sender, f"shape {list(push.shape)}")
    _require(
        0 < push.sequences <= len(push.tokens) // 8 and len(push.tokens) % (4 * push.sequences) == 0,
        sender,
        f"{len(push.tokens)} bytes of tokens for {push.sequences} sequences",
    )
    ids = torch.frombuffer(bytearray(push.tokens), dtype=torch.int32)
    low, high = (int(v) for v in torch.aminmax(ids))
    _require(
        low >= 0 and high < vocabulary, sender, f"token ids from {low} to {high}, not below {vocabulary}"
    )
    try:
        codec = codec_by_number(push.codec)
    except CodecError as error:
        raise RejectedError(sender, str(error)) from None
    return Push(
        route=route,
        stage=push.stage,
        backward=backward,
        codec=codec,
        shape=tuple(push.shape),
        tokens=push.tokens,
        sequences=push.sequences,
    )


def nobodys(microbatch: bytes) -> Route:
    """That of a microbatch whose trainer has left."""
    return Route(
        microbatch=microbatch,
        session=bytes(SESSION_BYTES),
        trainer="",
        attempt=0,
        peers=(),
        forward_until=0,
        backward_until=0,
    )


@dataclass(frozen=True, slots=True)
class Handover:
    """The gradients that a leaving peer has accumulated; their sum follows."""

    step: int
    tokens: int
    codec: Codec
    routes: tuple[Route, ...]  # whose they are; they lead nowhere

    def pack(self, stage: int) -> bytes:
        trainers = list(dict.fromkeys((route.trainer, route.session) for route in self.routes))
        number = {trainer: index for index, trainer in enumerate(trainers)}
        return pb.Handover(
            stage=stage,
            step=self.step,
            tokens=self.tokens,
            codec=self.codec.number,
            sessions=[pb.TrainerSession(trainer=t, session=s) for t, s in trainers],
            microbatches=[
                pb.HandedOver(
                    microbatch=route.microbatch,
                    session=number[route.trainer, route.session],
                    attempt=route.attempt,
                )
                for route in self.routes
            ],
        ).SerializeToString()


def parse_handover(sender: PeerId, data: bytes, *, stage: int, most_tokens: float) -> Handover:
    """Validate the header of a handover. Raises RejectedError."""
    try:
        said = pb.Handover.FromString(data)
        codec = codec_by_number(said.codec)
    except (DecodeError, CodecError) as error:
        raise RejectedError(sender, f"malformed handover: {error}") from None
    _require(said.stage == stage, sender, f"hands over gradients of stage {said.stage}")
    _require(0 < said.tokens <= most_tokens, sender, f"hands over gradients of {said.tokens} tokens")
    ids = {each.microbatch for each in said.microbatches}
    _require(len(ids) == len(said.microbatches) > 0, sender, "hands over a microbatch twice, or none")
    routes = []
    for each in said.microbatches:
        _require(each.session < len(said.sessions), sender, "hands over a microbatch of nobody")
        whose = said.sessions[each.session]
        route = pb.Route(
            microbatch=each.microbatch,
            session=whose.session,
            trainer=whose.trainer,
            attempt=each.attempt,
            peers=[sender],
        )
        routes.append(parse_route(sender, route))
    return Handover(said.step, said.tokens, codec, tuple(routes))


def pack_event(kind: int, route: Route, **details: object) -> bytes:
    """A watch frame with an event about `route`'s microbatch."""
    event = pb.Event(kind=kind, microbatch=route.microbatch, attempt=route.attempt, **details)  # type: ignore[arg-type]
    return pb.WatchFrame(event=event).SerializeToString()


def reply(status: int, reason: str = "") -> bytes:
    """The header of an answer to a hop request."""
    return pb.HopReply(status=status, reason=reason).SerializeToString()  # type: ignore[arg-type]


def parse_reply(sender: PeerId, data: bytes) -> pb.HopReply:
    """Parse an answer. Raises RejectedError."""
    try:
        return pb.HopReply.FromString(data)
    except DecodeError:
        raise RejectedError(sender, "malformed reply") from None


def _require(holds: bool, sender: PeerId, what: str) -> None:
    if not holds:
        raise RejectedError(sender, what)
