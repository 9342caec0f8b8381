"""Parts of every benchmark: a worker process for each measurement, resident memory, the machine's
matrix-product peak, tables.

This module knows nothing about models.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

THREADS = 2
ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "runs" / "results"


def worker(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run `python -m module --worker JOB` in a new process with THREADS threads.

    Returns the answer: the JSON in its last line of output."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src"))),
    }
    done = subprocess.run(
        [sys.executable, "-m", module, "--worker", json.dumps(job)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measurement {job} failed with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def resident() -> int:
    """Bytes of resident memory, after freed memory has gone back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Reset the kernel's record of peak resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of peak resident memory since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux")


def matmul_peak(seconds: float = 1.0) -> float:
    """Measure the machine's best float32 matrix product with THREADS threads, over a few shapes, in
    GFLOP/s."""
    torch.set_num_threads(THREADS)
    best = 0.0
    for m, k, n in ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        stop = time.perf_counter() + seconds / 3
        while time.perf_counter() < stop:
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * m * k * n / (time.perf_counter() - start) / 1e9)
    return best


def copy_peak(seconds: float = 0.5) -> float:
    """Measure the machine's best rate of reading one large array, in GB/s, with THREADS threads."""
    torch.set_num_threads(THREADS)
    x, best, stop = torch.randn(1 << 26), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        x.sum()
        best = max(best, x.numel() * 4 / (time.perf_counter() - start) / 1e9)
    return best


def machine() -> str:
    """Describe in one line the machine that figures come from."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    return (
        f"{name}, {os.cpu_count()} cores, {THREADS} threads, torch {torch.__version__}, Python"
        f" {platform.python_version()}"
    )


def show(rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    """Print a benchmark's rows: a JSON list, or the machine and a table."""
    print(json.dumps(rows, indent=1) if as_json else f"{machine()}\n\n{table(rows, columns)}")


def dress(panel: Any, axis: str, head: str, places: list[int]) -> None:
    """Add labels, a logarithmic axis with a tick at each measured place, a grid and a legend."""
    from matplotlib.ticker import NullLocator

    panel.set(xlabel=axis, ylabel=head, xscale="log")
    panel.set_xticks(places, [f"{place:,}" for place in places], fontsize=8)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def keep(figure: Any, title: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a figure, and its numbers as JSON in a file next to it; returns its path."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    path.with_suffix(".json").write_text(
        json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
    )
    return path


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Format a Markdown table: columns maps a key to its heading."""
    lines = [
        "| " + " | ".join(columns.values()) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
