"""Keep freed memory for the next tensor instead of giving it back to the system between any two.

glibc maps every large tensor afresh and zeroes its pages at first touch, in the middle of the arithmetic.
A peer allocates the same sizes over and over: reusing them saves a few per cent of its time.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # from malloc.h
KEEP_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Set glibc's thresholds, before threads allocate; no-op on another C library."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(M_ARENA_MAX, 1)  # a thread's own arena gives back 64 MB at a time, whatever the thresholds say
    mallopt(M_MMAP_MAX, 0)  # vectors of any size come from the heap and go back there
    mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
