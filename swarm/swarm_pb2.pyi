from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORWARD: _ClassVar[Direction]
    BACKWARD: _ClassVar[Direction]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAIN: _ClassVar[Mode]
    EVALUATE: _ClassVar[Mode]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACCEPTED: _ClassVar[Status]
    DUPLICATE: _ClassVar[Status]
    BUSY: _ClassVar[Status]
    STALE: _ClassVar[Status]
    CLOSED: _ClassVar[Status]
    REJECTED: _ClassVar[Status]
    UNKNOWN: _ClassVar[Status]
    LINK: _ClassVar[Status]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORWARDED: _ClassVar[EventKind]
    BACKWARDED: _ClassVar[EventKind]
    EVALUATED: _ClassVar[EventKind]
    PUSH_FAILED: _ClassVar[EventKind]
    DROPPED: _ClassVar[EventKind]
    ARRIVED: _ClassVar[EventKind]
    HANDED_OVER: _ClassVar[EventKind]
FORWARD: Direction
BACKWARD: Direction
TRAIN: Mode
EVALUATE: Mode
ACCEPTED: Status
DUPLICATE: Status
BUSY: Status
STALE: Status
CLOSED: Status
REJECTED: Status
UNKNOWN: Status
LINK: Status
FORWARDED: EventKind
BACKWARDED: EventKind
EVALUATED: EventKind
PUSH_FAILED: EventKind
DROPPED: EventKind
ARRIVED: EventKind
HANDED_OVER: EventKind

class Route(_message.Message):
    __slots__ = ("microbatch", "session", "trainer", "attempt", "peers", "forward_until", "backward_until", "mode", "step", "accumulated")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_UNTIL_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_UNTIL_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    microbatch: bytes
    session: bytes
    trainer: str
    attempt: int
    peers: _containers.RepeatedScalarFieldContainer[str]
    forward_until: int
    backward_until: int
    mode: Mode
    step: int
    accumulated: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, microbatch: _Optional[bytes] = ..., session: _Optional[bytes] = ..., trainer: _Optional[str] = ..., attempt: _Optional[int] = ..., peers: _Optional[_Iterable[str]] = ..., forward_until: _Optional[int] = ..., backward_until: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ..., step: _Optional[int] = ..., accumulated: _Optional[_Iterable[int]] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("route", "stage", "direction", "codec", "shape", "tokens", "sequences")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    route: Route
    stage: int
    direction: Direction
    codec: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    tokens: bytes
    sequences: int
    def __init__(self, route: _Optional[_Union[Route, _Mapping]] = ..., stage: _Optional[int] = ..., direction: _Optional[_Union[Direction, str]] = ..., codec: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ..., tokens: _Optional[bytes] = ..., sequences: _Optional[int] = ...) -> None: ...

class Resend(_message.Message):
    __slots__ = ("route", "direction")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    route: Route
    direction: Direction
    def __init__(self, route: _Optional[_Union[Route, _Mapping]] = ..., direction: _Optional[_Union[Direction, str]] = ...) -> None: ...

class Microbatches(_message.Message):
    __slots__ = ("session", "ids", "attempts")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    ids: _containers.RepeatedScalarFieldContainer[bytes]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session: _Optional[bytes] = ..., ids: _Optional[_Iterable[bytes]] = ..., attempts: _Optional[_Iterable[int]] = ...) -> None: ...

class HopRequest(_message.Message):
    __slots__ = ("push", "resend", "cancel", "release", "ping")
    PUSH_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    push: Push
    resend: Resend
    cancel: Microbatches
    release: Microbatches
    ping: bool
    def __init__(self, push: _Optional[_Union[Push, _Mapping]] = ..., resend: _Optional[_Union[Resend, _Mapping]] = ..., cancel: _Optional[_Union[Microbatches, _Mapping]] = ..., release: _Optional[_Union[Microbatches, _Mapping]] = ..., ping: _Optional[bool] = ...) -> None: ...

class Accumulated(_message.Message):
    __slots__ = ("microbatch", "step", "loss")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    microbatch: bytes
    step: int
    loss: float
    def __init__(self, microbatch: _Optional[bytes] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class HopReply(_message.Message):
    __slots__ = ("status", "reason", "accumulated")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    status: Status
    reason: str
    accumulated: _containers.RepeatedCompositeFieldContainer[Accumulated]
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., reason: _Optional[str] = ..., accumulated: _Optional[_Iterable[_Union[Accumulated, _Mapping]]] = ...) -> None: ...

class WatchPing(_message.Message):
    __slots__ = ("session", "echo_s", "fresh", "silent", "version")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ECHO_S_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    echo_s: float
    fresh: bool
    silent: _containers.RepeatedScalarFieldContainer[str]
    version: int
    def __init__(self, session: _Optional[bytes] = ..., echo_s: _Optional[float] = ..., fresh: _Optional[bool] = ..., silent: _Optional[_Iterable[str]] = ..., version: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("kind", "microbatch", "attempt", "step", "loss", "direction", "target", "status", "reason")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: EventKind
    microbatch: bytes
    attempt: int
    step: int
    loss: float
    direction: Direction
    target: str
    status: Status
    reason: str
    def __init__(self, kind: _Optional[_Union[EventKind, str]] = ..., microbatch: _Optional[bytes] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ..., direction: _Optional[_Union[Direction, str]] = ..., target: _Optional[str] = ..., status: _Optional[_Union[Status, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sent_at_s", "queue", "version")
    SENT_AT_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    sent_at_s: float
    queue: int
    version: int
    def __init__(self, sent_at_s: _Optional[float] = ..., queue: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class Stepped(_message.Message):
    __slots__ = ("version", "microbatches", "whole", "fresh")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    version: int
    microbatches: _containers.RepeatedScalarFieldContainer[bytes]
    whole: bool
    fresh: bool
    def __init__(self, version: _Optional[int] = ..., microbatches: _Optional[_Iterable[bytes]] = ..., whole: _Optional[bool] = ..., fresh: _Optional[bool] = ...) -> None: ...

class WatchFrame(_message.Message):
    __slots__ = ("heartbeat", "event", "stepped", "coming", "loading")
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    heartbeat: Heartbeat
    event: Event
    stepped: Stepped
    coming: bool
    loading: bool
    def __init__(self, heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., stepped: _Optional[_Union[Stepped, _Mapping]] = ..., coming: _Optional[bool] = ..., loading: _Optional[bool] = ...) -> None: ...

class StateAsk(_message.Message):
    __slots__ = ("stage", "step", "begun", "at")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    stage: int
    step: int
    begun: int
    at: int
    def __init__(self, stage: _Optional[int] = ..., step: _Optional[int] = ..., begun: _Optional[int] = ..., at: _Optional[int] = ...) -> None: ...

class StateChunk(_message.Message):
    __slots__ = ("mean", "number", "index", "squeezed")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SQUEEZED_FIELD_NUMBER: _ClassVar[int]
    mean: bool
    number: int
    index: int
    squeezed: bool
    def __init__(self, mean: _Optional[bool] = ..., number: _Optional[int] = ..., index: _Optional[int] = ..., squeezed: _Optional[bool] = ...) -> None: ...

class FromNewcomer(_message.Message):
    __slots__ = ("alive", "ask", "chunk", "coming")
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    alive: bool
    ask: StateAsk
    chunk: StateChunk
    coming: bool
    def __init__(self, alive: _Optional[bool] = ..., ask: _Optional[_Union[StateAsk, _Mapping]] = ..., chunk: _Optional[_Union[StateChunk, _Mapping]] = ..., coming: _Optional[bool] = ...) -> None: ...

class StateOffer(_message.Message):
    __slots__ = ("version", "number", "size_bytes", "busy")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    version: int
    number: int
    size_bytes: int
    busy: bool
    def __init__(self, version: _Optional[int] = ..., number: _Optional[int] = ..., size_bytes: _Optional[int] = ..., busy: _Optional[bool] = ...) -> None: ...

class FromDonor(_message.Message):
    __slots__ = ("alive", "offer", "chunk")
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    alive: bool
    offer: StateOffer
    chunk: StateChunk
    def __init__(self, alive: _Optional[bool] = ..., offer: _Optional[_Union[StateOffer, _Mapping]] = ..., chunk: _Optional[_Union[StateChunk, _Mapping]] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("stage", "step", "tokens", "codec", "sessions", "microbatches")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    stage: int
    step: int
    tokens: int
    codec: int
    sessions: _containers.RepeatedCompositeFieldContainer[TrainerSession]
    microbatches: _containers.RepeatedCompositeFieldContainer[HandedOver]
    def __init__(self, stage: _Optional[int] = ..., step: _Optional[int] = ..., tokens: _Optional[int] = ..., codec: _Optional[int] = ..., sessions: _Optional[_Iterable[_Union[TrainerSession, _Mapping]]] = ..., microbatches: _Optional[_Iterable[_Union[HandedOver, _Mapping]]] = ...) -> None: ...

class TrainerSession(_message.Message):
    __slots__ = ("trainer", "session")
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    trainer: str
    session: bytes
    def __init__(self, trainer: _Optional[str] = ..., session: _Optional[bytes] = ...) -> None: ...

class HandedOver(_message.Message):
    __slots__ = ("microbatch", "session", "attempt")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    microbatch: bytes
    session: int
    attempt: int
    def __init__(self, microbatch: _Optional[bytes] = ..., session: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class HandoverReply(_message.Message):
    __slots__ = ("status", "reason", "step")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    status: Status
    reason: str
    step: int
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., reason: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...
