from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RoundGreeting(_message.Message):
    __slots__ = ("plan", "round", "weight")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    round: int
    weight: float
    def __init__(self, plan: _Optional[bytes] = ..., round: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("index", "weight")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    index: int
    weight: float
    def __init__(self, index: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class StepReport(_message.Message):
    __slots__ = ("step", "weight", "state_hash")
    STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    STATE_HASH_FIELD_NUMBER: _ClassVar[int]
    step: int
    weight: float
    state_hash: bytes
    def __init__(self, step: _Optional[int] = ..., weight: _Optional[float] = ..., state_hash: _Optional[bytes] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("ok", "ids")
    OK_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, ok: _Optional[bool] = ..., ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FromMember(_message.Message):
    __slots__ = ("report", "done", "alive")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    report: StepReport
    done: StepDone
    alive: bool
    def __init__(self, report: _Optional[_Union[StepReport, _Mapping]] = ..., done: _Optional[_Union[StepDone, _Mapping]] = ..., alive: _Optional[bool] = ...) -> None: ...

class PlanMember(_message.Message):
    __slots__ = ("peer", "weight")
    PEER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    peer: str
    weight: float
    def __init__(self, peer: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("key", "step", "members")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    step: int
    members: _containers.RepeatedCompositeFieldContainer[PlanMember]
    def __init__(self, key: _Optional[bytes] = ..., step: _Optional[int] = ..., members: _Optional[_Iterable[_Union[PlanMember, _Mapping]]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("commit", "ids", "duplicate")
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    commit: bool
    ids: _containers.RepeatedScalarFieldContainer[bytes]
    duplicate: bool
    def __init__(self, commit: _Optional[bool] = ..., ids: _Optional[_Iterable[bytes]] = ..., duplicate: _Optional[bool] = ...) -> None: ...

class FromCoordinator(_message.Message):
    __slots__ = ("alive", "behind", "drifted", "plan", "verdict", "moved")
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    DRIFTED_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    alive: bool
    behind: int
    drifted: bool
    plan: StepPlan
    verdict: Verdict
    moved: str
    def __init__(self, alive: _Optional[bool] = ..., behind: _Optional[int] = ..., drifted: _Optional[bool] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., moved: _Optional[str] = ...) -> None: ...

class StepQuery(_message.Message):
    __slots__ = ("plan", "step")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    step: int
    def __init__(self, plan: _Optional[bytes] = ..., step: _Optional[int] = ...) -> None: ...

class StepInfo(_message.Message):
    __slots__ = ("committed", "ids", "version", "coordinator", "reports")
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    committed: bool
    ids: _containers.RepeatedScalarFieldContainer[bytes]
    version: int
    coordinator: str
    reports: int
    def __init__(self, committed: _Optional[bool] = ..., ids: _Optional[_Iterable[bytes]] = ..., version: _Optional[int] = ..., coordinator: _Optional[str] = ..., reports: _Optional[int] = ...) -> None: ...
