"""Chooses how many threads torch computes with, for the calling thread alone; and repairs threads
after a fork.

In: the size of a forward pass. Out: a context within which torch uses fewer threads. Threads that
share small operations wait for each other after each one: on an idle machine that costs more than
it gains, on a busy one the waiting is most of the time. A number that the user set is respected
(OMP_NUM_THREADS, MKL_NUM_THREADS, torch.set_num_threads), and no other thread's number changes.
Knows nothing about models."""

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

# Seconds of the packaged model (3.6 million weights) on two idle cores, by the cells of a pass:
#
#     weights x cells    30 million   115 million   460 million   1,900 million
#     one thread            0.162         0.275         0.928           0.160
#     two threads           0.185         0.355         0.855           0.126
FEEDS = 150_000_000  # weights x cells for which one more thread is worth its barriers
FEW = 12  # cells up to which reading the weights takes most of a pass
OWN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_locks: WeakSet[Any] = WeakSet()
_forked: int | None = None  # the forking thread of a forked process, which lost its OpenMP threads


def fork_safe_lock() -> Any:
    """Return a reentrant lock that is free in a forked process, whatever thread had it."""
    created = threading.RLock()
    _locks.add(created)
    return created


def threads_for(weights: int, cells: int, most: int) -> int:
    """Return how many threads are worth it for a pass of so many cells and weights, from 1 to
    `most`."""
    return max(1, min(most, weights * max(cells, FEW) // FEEDS))


@contextmanager
def limit_threads(weights: int, cells: int) -> Iterator[None]:
    """Limit torch's threads in this thread to what a pass of this size is worth. Does nothing if
    the user set a number."""
    now = torch.get_num_threads()
    few = threads_for(weights, cells, now)
    if few == now or _user_chose(now):
        yield
        return
    set_threads = _thread_setter()
    assert set_threads is not None
    set_threads(few)
    try:
        yield
    finally:
        if torch.get_num_threads() == few:  # else another number was set in the meantime
            set_threads(now)


def _user_chose(now: int) -> bool:
    """Return whether the number of threads must stay: the user chose it, or it cannot be set for
    one thread."""
    return any(os.environ.get(name) for name in OWN) or _thread_setter() is None or _was_set(now)


@functools.cache
def _thread_setter() -> Callable[[int], Any] | None:
    """Return OpenMP's own function of the library that torch computes with; None if there is none.

    `torch.set_num_threads` would also be inherited by every thread that starts in the meantime."""
    now, loaded = torch.get_num_threads(), getattr(os, "RTLD_NOLOAD", None)
    for name in (
        None,
        *(("libgomp.so.1", "libomp.so", "libiomp5.so") if loaded is not None else ()),
    ):
        try:
            set_threads = ctypes.CDLL(
                name, mode=ctypes.DEFAULT_MODE | (loaded or 0)
            ).omp_set_num_threads
        except (OSError, TypeError, AttributeError):
            continue
        set_threads(now + 1)
        moved = torch.get_num_threads() == now + 1
        set_threads(now)
        if moved:
            return set_threads
    return None


@functools.lru_cache(maxsize=16)
def _was_set(now: int) -> bool:
    """Return whether `torch.set_num_threads` was called before torch's number was first seen to be
    `now`.

    A new thread inherits a number that was set, else OpenMP's own, which is set to 1 there."""
    seen, set_threads = [], _thread_setter()
    assert set_threads is not None

    def look() -> None:
        set_threads(1)
        seen.append(torch.get_num_threads())

    probe = threading.Thread(target=look)
    probe.start()
    probe.join()
    return seen != [1]


def survive_fork() -> None:
    """Let the thread that forked compute alone in a forked process, with a warning; call this at
    the start of a public function.

    Its OpenMP threads stayed with the parent, and it would wait for them for ever."""
    global _forked
    if _forked is None or _forked != threading.get_ident():
        return
    _forked, set_threads = None, _thread_setter()
    (set_threads or torch.set_num_threads)(1)
    message = (
        "this process was forked from one that computes with several threads, which do not come"
        " along: it goes on with one"
    )
    warnings.warn(f"{message}; start processes by 'spawn' for more", BdlmWarning, stacklevel=3)


def _in_child() -> None:
    global _forked
    if torch.get_num_threads() > 1:
        _forked = threading.get_ident()
    for lock in list(_locks):
        lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
