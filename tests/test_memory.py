"""Freed memory is reused, not returned to the system."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
import resource
from concurrent.futures import ThreadPoolExecutor

from ldm_smd.memory import keep_freed_memory

ctypes.CDLL(None).prctl({no_huge_pages}, 1, 0, 0, 0)


def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * 2**25
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


{call}
with ThreadPoolExecutor(1) as pool:
    print(page_faults(), pool.submit(page_faults).result())
"""


PR_SET_THP_DISABLE = 41
"""Of linux/prctl.h."""


def page_faults(call, **environment):
    """Return how often a page was mapped for twenty blocks of 32 MiB, one after the other: in the main thread, in another."""
    command = [sys.executable, "-c", PROGRAM.format(call=call, no_huge_pages=PR_SET_THP_DISABLE)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    printed = subprocess.run(command, env=inherited | environment, capture_output=True, check=True).stdout
    return [int(number) for number in printed.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_is_reused_in_all_threads_unless_the_environment_has_settings_of_malloc():
    default = page_faults("")
    kept = page_faults("keep_freed_memory()")
    assert all(count < few / 10 for count, few in zip(kept, default, strict=True)), (kept, default)
    by_the_user = page_faults("keep_freed_memory()", MALLOC_ARENA_MAX="4")
    assert all(count > few / 2 for count, few in zip(by_the_user, default, strict=True)), (by_the_user, default)
