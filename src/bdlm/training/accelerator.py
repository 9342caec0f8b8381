"""Set up what a run needs around it: devices and processes, the folder lock, the clock, and the
signals that stop it.

Knows nothing about models or data. accelerate is imported in this module only, and late."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from bdlm.core.errors import ConfigError, nearest, shown
from bdlm.training.checkpoint import folder_lock
from bdlm.training.config import TrainConfig


def make_accelerator(config: TrainConfig) -> Any:
    """Make an `accelerate.Accelerator` for the config: device, mixed precision, trackers. Under
    `accelerate launch` it spans several processes."""
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    # Apple's MPS has no float64, in which noise and losses are computed; without an accelerator,
    # cpu=True lets several processes find each other
    cpu = (
        config.device == "cpu"
        or torch.backends.mps.is_available()
        or not torch.accelerator.is_available()
    )
    _check_trackers(config.log.trackers)
    bf16 = config.precision == "bf16" or (
        config.precision == "auto"
        and not cpu
        and torch.cuda.is_available()
        and torch.cuda.is_bf16_supported()
    )
    # an earlier run of this process would impose its device and precision
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(PartialState().num_processes == 1)
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        cpu=cpu,
        log_with=list(config.log.trackers) or None,
        project_dir=config.out,
    )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def _check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that accelerate does not know or whose package is missing;
    accelerate itself would skip it silently."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, installed = (
        {str(name) for name in LoggerType},
        {str(name) for name in get_available_trackers()},
    )
    for name in names:
        if name not in known:
            raise ConfigError(f"log.trackers names {shown(name)}{nearest(name[:80], known)}")
        if name != "all" and name not in installed:
            package = name.replace("_", "-")
            raise ConfigError(
                f"log.trackers names '{name}', whose package is not installed; `pip install"
                f" {package}`, or leave it out"
            )


def keep_freed_memory() -> bool:
    """Make the C library keep memory that a step frees for the next step, up to 2 GB. Returns
    whether this took effect.

    By default it returns large pieces to the system, which clears them page by page when the next
    step asks for them: 2 to 4 % of a step on a CPU. The setting holds for the whole process, also
    after the run; pieces above 32 MB are still returned. Only glibc supports it."""
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD: bytes
    options = {-3: 1 << 25, -1: (1 << 31) - 1, -2: 1 << 26}
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt if sys.platform == "linux" else None
    except (OSError, AttributeError):  # another C library
        mallopt = None
    return mallopt is not None and all(
        [mallopt(option, size) == 1 for option, size in options.items()]
    )


def lock_run_folder(folder: Path, accelerator: Any) -> AbstractContextManager[Callable[[], None]]:
    """Lock the run folder from the main process. Yields a function that raises CheckpointError once
    the folder is gone (`checkpoint.folder_lock`)."""
    return folder_lock(folder) if accelerator.is_main_process else nullcontext(lambda: None)


class RunClock:
    """Counts the seconds that a run has taken, including the time before a resume."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start


class StopSignals:
    """Note the first SIGTERM or SIGINT inside a `with` block, so that the loop ends after its step;
    a second signal acts as usual."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before.get(number, signal.SIG_DFL))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
