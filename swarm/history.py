"""Which microbatches the last steps of a stage contain: a part of its state.

A newcomer loads it with the parameters, so every peer of a stage can tell whether a gradient that turns
up late is in the parameters already. That keeps a stage from counting a microbatch twice whatever
trainers believe, and it is the evidence by which a trainer counts a hop as done.

Pure.
"""

from collections.abc import Collection, Iterator, Mapping

REMEMBERED_STEPS = 32
ID_BYTES, ENTRY_BYTES = 16, 24  # an entry: the step as 8 bytes, little-endian, and a microbatch id


class History:
    """Step -> the microbatches whose gradients are in it. Immutable: safe to read from any thread."""

    def __init__(self, steps: Mapping[int, frozenset[bytes]] | None = None) -> None:
        self.steps: Mapping[int, frozenset[bytes]] = dict(steps or {})

    def __contains__(self, microbatch: object) -> bool:
        return any(microbatch in inside for inside in self.steps.values())

    def __iter__(self) -> Iterator[bytes]:
        for inside in self.steps.values():
            yield from inside

    def touches(self, microbatches: Collection[bytes]) -> bool:
        """Is any of these in one of the steps?"""
        return any(not inside.isdisjoint(microbatches) for inside in self.steps.values())

    def with_step(self, step: int, microbatches: Collection[bytes]) -> "History":
        """This history and one step more; the oldest beyond `REMEMBERED_STEPS` are forgotten."""
        steps = {**self.steps, step: frozenset(microbatches)}
        return History({s: steps[s] for s in sorted(steps)[-REMEMBERED_STEPS:]})

    def pack(self) -> bytes:
        return b"".join(
            step.to_bytes(8, "little") + microbatch
            for step, inside in sorted(self.steps.items())
            for microbatch in sorted(inside)
        )

    @classmethod
    def unpack(cls, data: bytes) -> "History":
        """Raises ValueError when `data` is not a packed history."""
        if len(data) % ENTRY_BYTES:
            raise ValueError(f"a history of {len(data)} bytes is not whole")
        steps: dict[int, set[bytes]] = {}
        for start in range(0, len(data), ENTRY_BYTES):
            step = int.from_bytes(data[start : start + 8], "little")
            steps.setdefault(step, set()).add(data[start + 8 : start + ENTRY_BYTES])
        if len(steps) > REMEMBERED_STEPS:
            raise ValueError(f"a history of {len(steps)} steps is longer than {REMEMBERED_STEPS}")
        return cls({step: frozenset(inside) for step, inside in steps.items()})
