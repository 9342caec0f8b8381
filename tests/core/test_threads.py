"""Threads: as many as a pass feeds, for the calling thread alone; what the user set stands; a
forked process does not hang."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from bdlm.cli import wait_passively
from bdlm.core.threads import FEEDS, OWN, threads_for


def python(script: str, **settings: str) -> str:
    """What a script prints in a process of its own, without this one's settings of threads."""
    env = {name: value for name, value in os.environ.items() if name not in OWN} | settings
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("weights", "cells", "threads"),
    [
        (3_600_000, 8, 1),
        (3_600_000, 32, 1),
        (3_600_000, 128, 3),
        (40_000_000, 1, 3),
        (10**9, 1, 16),
        (0, 10**6, 1),
        (FEEDS // 12, 0, 1),
    ],
)
def test_a_pass_gets_the_threads_that_it_feeds(weights: int, cells: int, threads: int) -> None:
    assert threads_for(weights, cells, 16) == threads
    assert threads_for(weights, cells, 1) == 1


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_only_the_calling_thread_has_fewer_and_only_meanwhile() -> None:
    said = python("""
        import threading, torch
        from bdlm.core.threads import limit_threads, _thread_setter
        most, seen = torch.get_num_threads(), []
        look = lambda: seen.append(torch.get_num_threads())
        with limit_threads(1, 1):
            inside = torch.get_num_threads()
            other = threading.Thread(target=look); other.start(); other.join()
        try:
            with limit_threads(1, 1):
                raise ValueError
        except ValueError:
            pass
        with limit_threads(10**9, 10**3):
            fed_well = torch.get_num_threads()
        assert inside == (1 if _thread_setter() else most), inside
        assert seen == [most] and fed_well == most and torch.get_num_threads() == most, (seen, most)
        print("done")
    """)
    assert said == "done\n"


@pytest.mark.parametrize("settings", [{"OMP_NUM_THREADS": "3"}, {}], ids=["of OpenMP", "of torch"])
def test_what_the_user_set_stands(settings: dict[str, str]) -> None:
    put = (
        ""
        if settings
        else "torch.set_num_threads(torch.get_num_threads() if torch.get_num_threads() > 1 else 3)"
    )
    said = python(
        f"""
        import torch
        {put}
        from bdlm.core.threads import limit_threads
        most = torch.get_num_threads()
        with limit_threads(1, 1):
            assert torch.get_num_threads() == most > 1
        print("done")
        """,
        **settings,
    )
    assert said == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_goes_on_with_one_thread_and_says_so() -> None:
    said = python(
        """
        import os, signal, torch, bdlm
        lm = bdlm.load("shakespeare")
        torch.randn(700, 700) @ torch.randn(700, 700)
        score = lambda: lm.score("to be or not to be, that is the question " * 4).nats_per_token
        before = lm.generate("O", max_new_tokens=8).text, round(score(), 4)
        child = os.fork()
        if not child:
            signal.alarm(120)  # a child that hangs is ended
            same = (lm.generate("O", max_new_tokens=8).text, round(score(), 4)) == before
            os._exit(0 if same and torch.get_num_threads() == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0 and torch.get_num_threads() == 2
        """,
        OMP_NUM_THREADS="2",
        OMP_WAIT_POLICY="PASSIVE",
    )
    assert said.count("this process was forked") == 1


@pytest.mark.parametrize(
    "own",
    [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "99"}, {"KMP_BLOCKTIME": "1"}],
    ids=str,
)
def test_the_command_lines_threads_wait_asleep_unless_the_user_says_otherwise(
    own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(own))
    wait_passively()
    assert os.environ == (own or {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"})
