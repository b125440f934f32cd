"""Settings of the C library's memory allocator, from which CPU tensors come."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST_THRESHOLD = 32 * 2**20  # that glibc takes


def keep_freed_memory() -> None:
    """Let malloc keep the memory of tensors below 32 MiB for the next ones, as the GPU's allocator
    does.

    glibc returns memory to the system when it is freed, and the next tensor's pages are faulted in
    and cleared again, which takes longer than to fill them. Larger tensors are few, and kept they
    leave holes between smaller ones: the quickstart's ranks grew from 6.5 to 8.3 GiB by them, and
    were no faster.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
