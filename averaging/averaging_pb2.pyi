from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RoundGreeting(_message.Message):
    __slots__ = ("plan", "line", "attempt")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    line: int
    attempt: int
    def __init__(self, plan: _Optional[bytes] = ..., line: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("index", "weight")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    index: int
    weight: float
    def __init__(self, index: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class RoundFrame(_message.Message):
    __slots__ = ("alive", "begin", "piece")
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    alive: bool
    begin: float
    piece: Piece
    def __init__(self, alive: _Optional[bool] = ..., begin: _Optional[float] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ...) -> None: ...

class Pass(_message.Message):
    __slots__ = ("values", "fine")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    FINE_FIELD_NUMBER: _ClassVar[int]
    values: int
    fine: int
    def __init__(self, values: _Optional[int] = ..., fine: _Optional[int] = ...) -> None: ...

class StepReport(_message.Message):
    __slots__ = ("step", "weight", "state_hash", "passes", "bandwidth", "mode", "dated")
    STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    STATE_HASH_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DATED_FIELD_NUMBER: _ClassVar[int]
    step: int
    weight: float
    state_hash: bytes
    passes: _containers.RepeatedCompositeFieldContainer[Pass]
    bandwidth: float
    mode: int
    dated: bool
    def __init__(self, step: _Optional[int] = ..., weight: _Optional[float] = ..., state_hash: _Optional[bytes] = ..., passes: _Optional[_Iterable[_Union[Pass, _Mapping]]] = ..., bandwidth: _Optional[float] = ..., mode: _Optional[int] = ..., dated: _Optional[bool] = ...) -> None: ...

class Frozen(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Missing(_message.Message):
    __slots__ = ("reducer", "held")
    REDUCER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    reducer: str
    held: int
    def __init__(self, reducer: _Optional[str] = ..., held: _Optional[int] = ...) -> None: ...

class RoundDone(_message.Message):
    __slots__ = ("line", "attempt", "missing", "lost", "unused")
    LINE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    UNUSED_FIELD_NUMBER: _ClassVar[int]
    line: int
    attempt: int
    missing: _containers.RepeatedCompositeFieldContainer[Missing]
    lost: _containers.RepeatedScalarFieldContainer[str]
    unused: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, line: _Optional[int] = ..., attempt: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[Missing, _Mapping]]] = ..., lost: _Optional[_Iterable[str]] = ..., unused: _Optional[_Iterable[str]] = ...) -> None: ...

class FromMember(_message.Message):
    __slots__ = ("report", "frozen", "alive", "done", "failed", "heard")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HEARD_FIELD_NUMBER: _ClassVar[int]
    report: StepReport
    frozen: Frozen
    alive: bool
    done: RoundDone
    failed: bool
    heard: bool
    def __init__(self, report: _Optional[_Union[StepReport, _Mapping]] = ..., frozen: _Optional[_Union[Frozen, _Mapping]] = ..., alive: _Optional[bool] = ..., done: _Optional[_Union[RoundDone, _Mapping]] = ..., failed: _Optional[bool] = ..., heard: _Optional[bool] = ...) -> None: ...

class PlanMember(_message.Message):
    __slots__ = ("peer", "weight", "bandwidth", "mode")
    PEER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    weight: float
    bandwidth: float
    mode: int
    def __init__(self, peer: _Optional[str] = ..., weight: _Optional[float] = ..., bandwidth: _Optional[float] = ..., mode: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("key", "step", "members", "passes", "slow_links")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    SLOW_LINKS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    step: int
    members: _containers.RepeatedCompositeFieldContainer[PlanMember]
    passes: _containers.RepeatedCompositeFieldContainer[Pass]
    slow_links: bool
    def __init__(self, key: _Optional[bytes] = ..., step: _Optional[int] = ..., members: _Optional[_Iterable[_Union[PlanMember, _Mapping]]] = ..., passes: _Optional[_Iterable[_Union[Pass, _Mapping]]] = ..., slow_links: _Optional[bool] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("commit", "ids", "duplicate", "left_out", "outdated")
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    OUTDATED_FIELD_NUMBER: _ClassVar[int]
    commit: bool
    ids: _containers.RepeatedScalarFieldContainer[bytes]
    duplicate: bool
    left_out: _containers.RepeatedScalarFieldContainer[str]
    outdated: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, commit: _Optional[bool] = ..., ids: _Optional[_Iterable[bytes]] = ..., duplicate: _Optional[bool] = ..., left_out: _Optional[_Iterable[str]] = ..., outdated: _Optional[_Iterable[str]] = ...) -> None: ...

class RoundWork(_message.Message):
    __slots__ = ("peer", "reduced", "passed")
    PEER_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    peer: str
    reduced: _containers.RepeatedScalarFieldContainer[int]
    passed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, peer: _Optional[str] = ..., reduced: _Optional[_Iterable[int]] = ..., passed: _Optional[_Iterable[int]] = ...) -> None: ...

class Repair(_message.Message):
    __slots__ = ("line", "attempt", "members", "speakers", "work")
    LINE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SPEAKERS_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    line: int
    attempt: int
    members: _containers.RepeatedScalarFieldContainer[str]
    speakers: _containers.RepeatedScalarFieldContainer[str]
    work: _containers.RepeatedCompositeFieldContainer[RoundWork]
    def __init__(self, line: _Optional[int] = ..., attempt: _Optional[int] = ..., members: _Optional[_Iterable[str]] = ..., speakers: _Optional[_Iterable[str]] = ..., work: _Optional[_Iterable[_Union[RoundWork, _Mapping]]] = ...) -> None: ...

class FromCoordinator(_message.Message):
    __slots__ = ("alive", "behind", "drifted", "plan", "verdict", "moved", "repair")
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    DRIFTED_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    alive: bool
    behind: int
    drifted: bool
    plan: StepPlan
    verdict: Verdict
    moved: str
    repair: Repair
    def __init__(self, alive: _Optional[bool] = ..., behind: _Optional[int] = ..., drifted: _Optional[bool] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., moved: _Optional[str] = ..., repair: _Optional[_Union[Repair, _Mapping]] = ...) -> None: ...

class StepQuery(_message.Message):
    __slots__ = ("plan", "step")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    step: int
    def __init__(self, plan: _Optional[bytes] = ..., step: _Optional[int] = ...) -> None: ...

class StepInfo(_message.Message):
    __slots__ = ("committed", "ids", "version", "coordinator", "reports", "pending", "left_out", "outdated", "leaving", "helps")
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    OUTDATED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    HELPS_FIELD_NUMBER: _ClassVar[int]
    committed: bool
    ids: _containers.RepeatedScalarFieldContainer[bytes]
    version: int
    coordinator: str
    reports: int
    pending: bool
    left_out: _containers.RepeatedScalarFieldContainer[str]
    outdated: _containers.RepeatedScalarFieldContainer[str]
    leaving: bool
    helps: bool
    def __init__(self, committed: _Optional[bool] = ..., ids: _Optional[_Iterable[bytes]] = ..., version: _Optional[int] = ..., coordinator: _Optional[str] = ..., reports: _Optional[int] = ..., pending: _Optional[bool] = ..., left_out: _Optional[_Iterable[str]] = ..., outdated: _Optional[_Iterable[str]] = ..., leaving: _Optional[bool] = ..., helps: _Optional[bool] = ...) -> None: ...
