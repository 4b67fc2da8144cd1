"""Keep freed memory for the next tensor instead of giving it back to the system between any two.

glibc maps every large tensor afresh and zeroes its pages at first touch, in the middle of the arithmetic.
A peer allocates the same sizes over and over: reusing them saves a few per cent of its time.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
KEEP_BYTES, LARGEST_BYTES = 512 << 20, 32 << 20


def keep_freed_memory() -> None:
    """Set glibc's thresholds; no-op on another C library."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
