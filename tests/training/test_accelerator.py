"""What a run asks of the machine it stands on."""

import os
import platform
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALWAYS_HUGE = HUGE.is_file() and "[always]" in HUGE.read_text()  # then few faults are made anyhow
GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def faults(keep: bool) -> int:
    """Page faults of ten rounds in which 64 MB of pieces are taken and freed, after three others,
    in a process of its own.

    Its C library is told beforehand to give such pieces back at once; left alone, it may or may
    not."""
    code = f"""
        import resource, torch
        from bdlm.training.accelerator import keep_freed_memory
        assert not {keep} or keep_freed_memory()
        def round():
            pieces = [torch.ones(1 << 20) for _ in range(16)]
        for _ in range(3):
            round()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            round()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not GLIBC or ALWAYS_HUGE,
    reason="only glibc can be asked to keep freed memory, and pages must be small to tell",
)
def test_freed_memory_is_kept_for_the_next_step() -> None:
    pages = 10 * 16 * (4 << 20) // resource.getpagesize()
    assert faults(keep=True) < pages // 20
    assert faults(keep=False) > pages // 20
