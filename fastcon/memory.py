"""Freed memory stays with the process: on a CPU, getting fresh pages of the system costs more than filling them."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # it takes no more


def keep_freed() -> None:
    """Let glibc reuse what it frees instead of handing it back, for this whole process: for a command to call.

    Activations of a batch are megabytes that come and go with every layer. Does nothing where there is no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
