"""Freed memory is kept: allocating it again costs no page faults."""

import importlib.util
import subprocess
import sys

import pytest

from jaxdiff import host_memory

PROGRAM = """
import resource, numpy as np
from jaxdiff.host_memory import keep_freed_memory
if {keep}: assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill = lambda: np.ones(2**24).sum()  # 128 MiB: 32,768 pages of 4 KiB
fill()
before = faults()
fill()
print(faults() - before)
"""


HAS_ACCELERATOR = any(importlib.util.find_spec(name) for name in host_memory.ACCELERATORS)


@pytest.mark.skipif(HAS_ACCELERATOR or not sys.platform.startswith("linux"), reason="for a CPU and glibc's malloc only")
def test_pages_are_fetched_once_where_freed_memory_is_kept():
    def faults(keep):
        done = subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    given_back, kept = faults(False), faults(True)
    assert kept < given_back / 20, (kept, given_back)


def test_nothing_is_done_where_jax_has_an_accelerator(monkeypatch):
    monkeypatch.setattr(host_memory, "ACCELERATORS", ("json",))  # a module that is installed
    monkeypatch.setattr(host_memory.ctypes, "CDLL", None)  # calling it would raise
    assert not host_memory.keep_freed_memory()
