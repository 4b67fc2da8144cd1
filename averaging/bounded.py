"""What is remembered of others has a bound: the oldest goes first."""

from typing import Any


def forget_oldest(known: dict[Any, Any], most: int) -> None:
    """Keep the `most` entries that were added last."""
    while len(known) > most:
        del known[next(iter(known))]
