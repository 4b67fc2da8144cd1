"""How many bytes may be on their way to one peer: as many as keep the link busy, and few more.

Whatever is written beyond that lies in queues along the way, and all that is said later waits behind it: on a
slow link for seconds, in which signs of life do not come and the other end's permission to send on does not
either. So a sender asks for an echo every quarter of a window, and looks how long it takes: longer than ever
before means queues, and the window shrinks; else it grows, if it was what held the sender back.

Pure. Source: delay as the sign of a full queue, LEDBAT, RFC 6817.
"""

import math

FIRST_BYTES, LEAST_BYTES, MOST_BYTES = 1 << 18, 1 << 16, 1 << 24
ECHOES = 4  # per window
QUEUE_S = 0.25  # that bytes may wait along the way: more than a busy machine takes to answer
CAUTION = 16  # the window grows so much slower once a queue has been seen
FORGET = 1.0001  # per echo: a way that has become longer is no queue


class Window:
    """Of one peer, for all streams to it; each may have so many bytes under way."""

    def __init__(self) -> None:
        self.bytes = FIRST_BYTES
        self._least_s, self._has_queued = math.inf, False

    @property
    def stride(self) -> int:
        """So many bytes go from one echo to the next, and at most in one write."""
        return self.bytes // ECHOES

    def echoed(self, size: int, took_s: float, *, held_back: bool) -> None:
        """Another `size` bytes have arrived; `held_back` if the window kept somebody from sending more."""
        self._least_s = min(took_s, self._least_s * FORGET)
        queued_s = took_s - self._least_s
        if queued_s > QUEUE_S:
            self._has_queued = True
            self.bytes -= int(self.bytes * (1 - QUEUE_S / queued_s) / ECHOES)
        elif held_back:
            self.bytes += size // CAUTION if self._has_queued else size
        self.bytes = min(MOST_BYTES, max(LEAST_BYTES, self.bytes))
