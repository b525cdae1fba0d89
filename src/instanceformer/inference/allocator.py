"""The C library's allocator, told to keep what is freed, since the next frame needs it again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_memory() -> None:
    """Keep freed memory in this process, and ask for huge pages.

    A frame's large tensors would otherwise go back to the system and be faulted in again, page by page, with the next
    frame. For a process that does nothing else, before its first tensor; its size stays at its peak. Where an
    environment variable says how to allocate, nothing changes; without glibc only the pages of PyTorch's do.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)
