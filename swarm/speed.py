"""How fast a peer computes, measured while it does: idle time says nothing about it.

Others decide by it who serves which stage, so it must be steady: it counts once enough has been measured,
is an average over the last minute of computing, and is not announced anew for small changes.

Pure.
"""

import math

WINDOW_S = 60.0  # of computing
ENOUGH_S = 1.0
STEADY = 0.2  # a speed that differs by less is not announced anew: others would move for nothing


class SpeedMeter:
    """Of one peer in one stage."""

    def __init__(self, cost: float) -> None:
        """`cost`: multiply-adds per token in the stage."""
        self._cost = cost
        self._tokens = self._busy_s = 0.0  # of the window
        self._seen_tokens = self._seen_s = 0.0
        self.announced = 0.0  # multiply-adds per second; 0 while too little is known

    def observe(self, tokens: float, busy_s: float) -> None:
        """So many tokens have been computed so far, in so many seconds of computing."""
        new_tokens, new_s = tokens - self._seen_tokens, busy_s - self._seen_s
        self._seen_tokens, self._seen_s = tokens, busy_s
        kept = math.exp(-new_s / WINDOW_S)
        self._tokens, self._busy_s = self._tokens * kept + new_tokens, self._busy_s * kept + new_s
        if self._busy_s >= ENOUGH_S:
            speed = self._tokens / self._busy_s * self._cost
            if abs(speed - self.announced) > STEADY * self.announced:
                self.announced = speed
