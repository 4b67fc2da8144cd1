from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

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
