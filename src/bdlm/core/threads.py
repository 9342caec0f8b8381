"""How many threads torch computes with: as many as a pass feeds, in the calling thread alone; and
what a fork leaves behind.

In: the size of a pass. Out: a context within which torch uses fewer threads. Threads that share
small operations wait for each other after each: on a quiet machine that costs more than it brings,
on a busy one the waiting is most of the time. A number that the user set stands (OMP_NUM_THREADS,
MKL_NUM_THREADS, torch.set_num_threads), and no other thread's number is touched. Knows nothing
about models."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch

from bdlm.core.errors import BdlmWarning

# Seconds of the packaged model (3.6 million weights) on two quiet cores, by the cells of a pass:
#
#     weights x cells    30 million   115 million   460 million   1,900 million
#     one thread            0.162         0.275         0.928           0.160
#     two threads           0.185         0.355         0.855           0.126
FEEDS = 150_000_000  # weights x cells that one thread needs to be worth its barriers
FEW = 12  # cells up to which a pass takes as long as reading the weights, whatever it computes
OWN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_locks: WeakSet[Any] = WeakSet()
_forked: int | None = None  # the thread of a forked process whose helpers did not come along


def lock() -> Any:
    """A lock that one thread may take several times, and that is free in a forked process, whoever
    held it."""
    made = threading.RLock()
    _locks.add(made)
    return made


def threads_for(weights: int, cells: int, most: int) -> int:
    """How many threads a pass of so many cells through so many weights feeds, from 1 to `most`."""
    return max(1, min(most, weights * max(cells, FEW) // FEEDS))


@contextmanager
def fed(weights: int, cells: int) -> Iterator[None]:
    """Within it, this thread computes with as many threads as a pass feeds. Changes nothing where
    the user set a number."""
    now = torch.get_num_threads()
    few = threads_for(weights, cells, now)
    if few == now or _users(now):
        yield
        return
    put = _setter()
    assert put is not None
    put(few)
    try:
        yield
    finally:
        if torch.get_num_threads() == few:  # else somebody set another number meanwhile
            put(now)


def _users(now: int) -> bool:
    """Whether the number of threads must be left alone: the user chose it, or it cannot be set for
    one thread."""
    return any(os.environ.get(name) for name in OWN) or _setter() is None or _was_set(now)


@functools.cache
def _setter() -> Callable[[int], Any] | None:
    """OpenMP's own function, of the library that torch computes with; None where there is none.

    `torch.set_num_threads` would also be inherited by every thread that starts meanwhile.
    """
    now, loaded = torch.get_num_threads(), getattr(os, "RTLD_NOLOAD", None)
    for name in (
        None,
        *(("libgomp.so.1", "libomp.so", "libiomp5.so") if loaded is not None else ()),
    ):
        try:
            put = ctypes.CDLL(name, mode=ctypes.DEFAULT_MODE | (loaded or 0)).omp_set_num_threads
        except (OSError, TypeError, AttributeError):
            continue
        put(now + 1)
        moved = torch.get_num_threads() == now + 1
        put(now)
        if moved:
            return put
    return None


@functools.lru_cache(maxsize=16)
def _was_set(now: int) -> bool:
    """Whether `torch.set_num_threads` was called before torch's number was first seen to be `now`.

    A new thread takes over a number that was set, else OpenMP's own, which is set to 1 there.
    """
    seen, put = [], _setter()
    assert put is not None

    def look() -> None:
        put(1)
        seen.append(torch.get_num_threads())

    probe = threading.Thread(target=look)
    probe.start()
    probe.join()
    return seen != [1]


def survive_fork() -> None:
    """For the start of a public call: in a forked process, let the thread that forked compute
    alone, with a warning.

    Its OpenMP threads stayed with the parent, and it would wait for them for ever.
    """
    global _forked
    if _forked is None or _forked != threading.get_ident():
        return
    _forked, put = None, _setter()
    (put or torch.set_num_threads)(1)
    said = (
        "this process was forked from one that computes with several threads, which do not come"
        " along: it goes on with one"
    )
    warnings.warn(f"{said}; start processes by 'spawn' for more", BdlmWarning, stacklevel=3)


def _in_child() -> None:
    global _forked
    if torch.get_num_threads() > 1:
        _forked = threading.get_ident()
    for held in list(_locks):
        held._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
