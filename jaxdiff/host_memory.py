"""Freed host memory is kept for the next step instead of being given back to the system and fetched again."""

import ctypes
import importlib.util
import sys

# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, for computing on a CPU; whether that could be arranged.

    A step on a CPU allocates its temporaries anew. By default malloc maps and unmaps them, so every page of them is cleared by
    the system at every step (benchmarks/host_memory.py). Not where JAX has an accelerator, whose memory is another one. Must come
    before JAX's first computation: threads keep the arena that they began with.
    """
    if not sys.platform.startswith("linux") or any(importlib.util.find_spec(name) for name in ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # no other C library has it
    if mallopt is None:
        return False
    return all(mallopt(*option) == 1 for option in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))
