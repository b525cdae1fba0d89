from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from instanceformer.inference.allocator import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
import torch
for round in range(6):
    if round == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_000_000)  # 48 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **settings: str) -> int:
    """Pages that a process faults in with its last three large tensors."""
    told = ("GLIBC_TUNABLES", "MALLOC_", "THP_MEM_ALLOC_ENABLE")
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, env={**quiet, **settings}
    )
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    kept, returned = faults("keep"), faults("do not")
    assert 20 * kept < returned  # 48 MB are 12,000 pages
    assert 2 * faults("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=4") > returned  # who sets it himself is left alone
