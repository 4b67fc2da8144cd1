"""A large object in chunks: hashed by whoever has it, put together from several who have the same.

    every donor is asked for a few chunks ahead, so fast ones bring more than slow ones
    a chunk counts once its hash is right
    what a lost donor owed, the others are asked for
    once all chunks are asked for, idle donors are asked for what others will bring last

Pure.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from averaging.errors import ProtocolError
from averaging.network import Buffer, PeerId

CHUNK_BYTES = 1 << 20
HASH_BYTES = 32
MOST_ASKED = 2  # donors that are asked for the same chunk


@dataclass(frozen=True, slots=True)
class Contents:
    """What an object is, before any of it is here."""

    size_bytes: int
    hashes: tuple[bytes, ...]  # SHA-256 of every chunk

    @property
    def chunks(self) -> int:
        return len(self.hashes)

    def chunk_bytes(self, index: int) -> int:
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def pack(self) -> bytes:
        return b"".join(self.hashes)

    @classmethod
    def unpack(cls, size_bytes: int, packed: Buffer, *, donor: PeerId, most_bytes: int) -> "Contents":
        """What `donor` says it has. Raises ProtocolError."""
        if not 0 < size_bytes <= most_bytes:
            raise ProtocolError(donor, f"offers {size_bytes} bytes, at most {most_bytes} make sense")
        if len(packed) != HASH_BYTES * -(-size_bytes // CHUNK_BYTES):
            raise ProtocolError(donor, f"offers {size_bytes} bytes with {len(packed)} bytes of hashes")
        whole = bytes(packed)
        hashes = (whole[start : start + HASH_BYTES] for start in range(0, len(whole), HASH_BYTES))
        return cls(size_bytes, tuple(hashes))


class Sliceable(Protocol):
    """Bytes, wherever they lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> Buffer: ...


def chunk_of(data: Sliceable, index: int) -> Buffer:
    start = index * CHUNK_BYTES
    return data[start : start + CHUNK_BYTES]


def chunks_of(data: Sliceable) -> Iterator[Buffer]:
    """One after the other."""
    return (chunk_of(data, index) for index in range(-(-len(data) // CHUNK_BYTES)))


def hash_of(chunk: Buffer) -> bytes:
    return hashlib.sha256(chunk).digest()


class Download:
    """Which chunk to ask of whom, and what has come."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        # Memory as it comes, aligned: to set 100 MB to zero first holds all else up for a third of a second.
        self.data: memoryview = torch.empty(contents.size_bytes, dtype=torch.uint8).numpy().data
        self.received_bytes = 0
        self._unasked = deque(range(contents.chunks))
        self._asked: dict[int, list[PeerId]] = {}  # what has not come yet, in order of asking

    @property
    def whole(self) -> bool:
        return not self._unasked and not self._asked

    def next_of(self, donor: PeerId, *, idle: bool) -> int | None:
        """The chunk to ask `donor` for, which counts as asked; None if there is none for it now.

        `idle`: it owes nothing.
        """
        if self._unasked:
            index = self._unasked.popleft()
        else:
            asked = reversed(self._asked.items()) if idle else ()
            last = (i for i, donors in asked if donor not in donors and len(donors) < MOST_ASKED)
            if (found := next(last, None)) is None:
                return None
            index = found
        self._asked.setdefault(index, []).append(donor)
        return index

    def take(self, donor: PeerId, index: int, chunk: Buffer) -> None:
        """A chunk has come; no-op if another donor was faster. Raises ProtocolError if it is not right."""
        if index not in self._asked:
            return
        if len(chunk) != self.contents.chunk_bytes(index) or hash_of(chunk) != self.contents.hashes[index]:
            raise ProtocolError(donor, f"chunk {index} does not have the hash that it announced")
        start = index * CHUNK_BYTES
        self.data[start : start + len(chunk)] = chunk
        self.received_bytes += len(chunk)
        del self._asked[index]

    def lose(self, donor: PeerId) -> None:
        """It brings nothing any more; no-op for one that owes nothing."""
        for index, donors in list(self._asked.items()):
            if donor in donors:
                donors.remove(donor)
                if not donors:
                    del self._asked[index]
                    self._unasked.appendleft(index)
