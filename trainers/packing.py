"""Texts -> sequences of token ids of one length, nothing padded, nothing thrown away.

Documents are joined with a separator and cut every T tokens; each sequence carries one more token, the
target of its last position.

Pure.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch


class Tokenizer(Protocol):
    vocabulary: int
    separator: int

    def encode(self, text: str) -> list[int]: ...


def sequences(documents: Iterable[str], tokenizer: Tokenizer, tokens: int) -> Iterator[list[int]]:
    """Cut the stream of documents into lists of `tokens + 1` ids; consecutive ones share one token."""
    buffer: list[int] = []
    for text in documents:
        buffer += tokenizer.encode(text)
        buffer.append(tokenizer.separator)
        start = 0
        while len(buffer) - start > tokens:
            yield buffer[start : start + tokens + 1]
            start += tokens
        del buffer[:start]


def microbatches(rows: Iterable[list[int]], sequences_per_microbatch: int) -> Iterator[torch.Tensor]:
    """Stack rows into [B, T + 1] int64 tensors; an incomplete last one is dropped."""
    batch: list[list[int]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == sequences_per_microbatch:
            yield torch.tensor(batch)
            batch = []
