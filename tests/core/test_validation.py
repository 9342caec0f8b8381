"""Values against annotations, and functions that refuse wrong arguments in one line."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from bdlm.core.errors import ConfigError, shown
from bdlm.core.validation import (
    AtLeast,
    Between,
    Count,
    Positive,
    Utf8,
    coerce,
    read_record,
    validate_fields,
    validated,
)

TAKEN = [  # annotation, value, what comes out
    (int, 3, 3),
    (int, np.int64(3), 3),
    (float, 3, 3.0),
    (float, np.float32(0.5), 0.5),
    (bool, False, False),
    (str | None, None, None),
    (str | Path, Path("a"), Path("a")),
    (Literal["a", "b"], "b", "b"),
    (tuple[str, ...], ["a", "b"], ("a", "b")),
    (tuple[str, ...], "ab", ("ab",)),  # one text where several may stand, not its letters
    (tuple[int, ...], 3, (3,)),
    (tuple[int, ...], range(2), (0, 1)),
    (tuple[float, float], (0, 1), (0.0, 1.0)),
    (str | Sequence[str], ["a"], ["a"]),
    (Mapping[int, float], {1: 2}, {1: 2.0}),
    (bool | Callable[[int], None], print, print),
    (Any, object, object),
]
REFUSED = [  # annotation, value, the suggested fix
    (int, 2.5, "a whole number"),
    (int, True, "a whole number"),
    (int, "3", "a whole number"),
    (float, torch.tensor(0.5), "a number"),
    (bool, 1, "true or false"),
    (str, b"a", "text"),
    (int | None, "x", "a whole number or None"),
    (Literal["a", "b", "c"], "d", "'a', 'b' or 'c'"),
    (Literal["a"], ["a"], "'a'"),
    (tuple[int, ...], "ab", "a list of whole numbers"),
    (tuple[int, ...], [1, "a"], "a list of whole numbers"),
    (tuple[float, float], (1.0,), "2 values"),
    (str | Path | Sequence[str | Path], 3, "text, a path or a list of texts or paths"),
    (Mapping[int, int], {"a": 1}, "a dictionary of whole numbers to whole numbers"),
    (Mapping[int, int], [1], "a dictionary of whole numbers to whole numbers"),
    (torch.device | None, 3, "a device or None"),
]


@pytest.mark.parametrize(("hint", "value", "expected"), TAKEN)
def test_what_fits_comes_out_as_asked_for(hint: Any, value: Any, expected: Any) -> None:
    found = coerce("x", value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("hint", "value", "fix"), REFUSED)
def test_what_does_not_fit_is_named_with_the_fix(hint: Any, value: Any, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        coerce("x", value, hint)
    assert str(error.value) == f"x is {value!r}; use {fix}"


RULED = [  # annotation, value, the suggested fix
    (Count, 0, "use 1 or more"),
    (Count | None, -1, "use 1 or more"),
    (int, 2**63, "use a whole number of 64 bits"),
    (int | None, -(2**63) - 1, "use a whole number of 64 bits"),
    (float, 10**400, "use a number that 64 bits can hold"),
    (tuple[Count, ...], (3, 0), "use 1 or more"),
    (Mapping[str, Count], {"a": 0}, "use 1 or more"),
    (Annotated[float, AtLeast(0, "use nats")], float("nan"), "use nats"),
    (Annotated[float, AtLeast(0)], float("inf"), "use 0 or more"),
    (Positive, 0, "use a positive number"),
    (Annotated[float, Between(0, 1)], 1.5, "use a value in [0, 1]"),
    (Annotated[float, Between(0, 1, "[)")], 1, "use a value in [0, 1)"),
    (Annotated[float, Between(0, 1, "(]")], 0, "use a value in (0, 1]"),
    (Annotated[str, Utf8()], "a\ud800", "leave out what is not UTF-8 text (a lone surrogate)"),
    (Count, "1", "use a whole number"),
    (tuple[Annotated[str, Utf8()], ...] | None, 3, "use a list of texts or None"),
]


@pytest.mark.parametrize(("hint", "value", "fix"), RULED)
def test_what_is_out_of_range_is_named_with_the_fix(hint: Any, value: Any, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        coerce("x", value, hint)
    assert str(error.value) == f"x is {shown(value)}; {fix}"


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Count, 1),
        (Count | None, None),
        (int, 2**63 - 1),
        (int, -(2**63)),
        (Annotated[float, Between(0, 1)], 0.0),
        (Annotated[float, Between(0, 1, "(]")], 1.0),
        (tuple[Annotated[str, Utf8()], ...], ("a", "ü")),
        (Annotated[int, "a note"], -1),
    ],
)
def test_what_is_in_range_is_taken(hint: Any, value: Any) -> None:
    assert coerce("x", value, hint) == value


@dataclass(frozen=True)
class Inner:
    lr: Positive = 0.1
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    steps: Count | None = None
    mode: Literal["fast", "slow"] = "fast"
    phases: tuple[tuple[float, tuple[Count, ...]], ...] = ()
    each: dict[str, Any] = dataclasses.field(default_factory=dict)
    on: bool = True


def test_a_record_is_read_from_plain_values() -> None:
    plain = {
        "inner": {"lr": "3e-4", "names": 4},
        "steps": "1e3",
        "phases": [[0, 1], ["0.5", [4, "8"]]],
        "each": {"a": [1]},
    }
    assert read_record(Outer, plain) == Outer(
        Inner(3e-4, ("4",)), 1000, "fast", ((0.0, (1,)), (0.5, (4, 8))), {"a": [1]}
    )
    assert read_record(Outer, {"inner": None, "steps": None}) == Outer(Inner())
    assert read_record(Outer, {"inner": {}, "steps": str(2**53 + 1)}).steps == 2**53 + 1, (
        "through no float"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"inner": {"lr": "x"}}, "inner.lr is 'x'; use a number"),
        ({"inner": {"lr": "nan"}}, "inner.lr is 'nan'; use a number"),
        ({"inner": {"lr": -1}}, "inner.lr is -1; use a positive number"),
        ({"inner": {"nmes": 1}}, "unknown field 'inner.nmes'; did you mean 'names'?"),
        ({"inner": 3}, "inner is 3; use a mapping of fields"),
        ({}, "config has no field 'inner'; it needs one"),
        ({"inner": {}, "mode": "slwo"}, "mode is 'slwo'; did you mean 'slow'?"),
        ({"inner": {}, "steps": 2.5}, "steps is 2.5; use a whole number"),
        ({"inner": {}, "steps": "inf"}, "steps is 'inf'; use a whole number"),
        ({"inner": {}, "steps": 2**63}, f"steps is {2**63}; use a whole number of 64 bits"),
        ({"inner": {}, "phases": [[0, [1, 0]]]}, "phases[0][1][1] is 0; use 1 or more"),
        ({"inner": {}, "phases": [[0]]}, "phases[0] is [0]; use 2 values"),
        ({"inner": {}, "each": [1]}, "each is [1]; use a mapping"),
        ({"inner": {}, "on": 1}, "on is 1; use true or false"),
    ],
)
def test_a_record_that_does_not_fit_names_its_innermost_field(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read_record(Outer, values)
    assert str(error.value) == said


def test_a_large_value_is_cut_to_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        coerce("x", torch.zeros(50, 50), int)
    assert len(str(error.value)) < 130
    assert "\n" not in str(error.value)


def inner(windows: Any, *, seed: int = 0, replicates: int = 4) -> tuple[Any, int, int]:
    return windows, seed, replicates


@validated(inner)
def outer(
    text: str | Sequence[str], share: float = 0.5, **options: Any
) -> tuple[Any, float, dict[str, Any]]:
    """What it is."""
    return text, share, options


@validated()
def open_ended(text: str = "", **options: Any) -> dict[str, Any]:
    return options


def test_a_checked_function_gets_its_arguments_as_annotated() -> None:
    assert outer("a") == ("a", 0.5, {})
    assert outer(["a"], 1, seed=np.int64(2)) == (["a"], 1.0, {"seed": 2})
    assert open_ended(anything=3) == {"anything": 3}
    assert outer.__doc__ == "What it is."


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: outer("a", foo=1), "has no argument 'foo'; known: replicates, seed, share, text"),
        (lambda: outer("a", replicate=1), "did you mean 'replicates'"),
        (lambda: outer("a", windows=1), "has no argument 'windows'"),  # outer's own to give
        (lambda: outer(), "missing a required argument: 'text'"),
        (lambda: outer("a", 1, 2), "too many positional"),
        (lambda: outer("a", text="b"), "multiple values for argument 'text'"),
        (lambda: outer(3), "text is 3; use text or a list of texts"),
        (lambda: outer("a", "b"), "share is 'b'; use a number"),
        (lambda: outer("a", seed="b"), "seed is 'b'; use a whole number"),
    ],
)
def test_a_checked_function_refuses_in_one_line(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_fault_inside_is_not_taken_for_a_wrong_argument() -> None:
    @validated()
    def broken(x: int) -> int:
        return len(x)

    with pytest.raises(TypeError, match="no len"):
        broken(3)


@validated()
def listed(text: str, *, steps: Count = 4, share: Annotated[float, Between(0, 1)] = 0.5) -> int:
    """Every option by its name."""
    return steps


def test_a_checked_function_shows_every_option(tmp_path: Path) -> None:
    """To `inspect`, `help` and a type checker; no function beside it has to be named."""
    assert list(inspect.signature(listed).parameters) == ["text", "steps", "share"]
    assert "steps" in pydoc.render_doc(listed) and "share" in pydoc.render_doc(listed)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        listed("a", step=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="steps is 0; use 1 or more"):
        listed("a", steps=0)
    with pytest.raises(ConfigError, match=r"share is 2; use a value in \[0, 1\]"):
        listed("a", share=2)


@pytest.mark.slow
def test_a_type_checker_sees_every_option(tmp_path: Path) -> None:
    file = tmp_path / "use.py"
    file.write_text(
        "from bdlm.core.validation import Count, validated\n\n"
        "@validated()\ndef listed(text: str, *, steps: Count = 4) -> int:\n    return steps\n\n"
        "good: int = listed('a', steps=2)\nlisted('a', steps='x')\nlisted('a', step=2)\n"
    )
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", str(file)],
        capture_output=True,
        text=True,
    ).stdout
    wrong = [line for line in said.splitlines() if "error" in line and "Found" not in line]
    assert (
        len(wrong) == 2
        and ":8:" in wrong[0]
        and "steps" in wrong[0]
        and ":9:" in wrong[1]
        and '"step"' in wrong[1]
    ), said


def test_fields_of_a_record() -> None:
    @dataclass(frozen=True)
    class Record:
        share: float
        names: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            validate_fields(self)

    made = Record(1, "a")
    assert made == Record(1.0, ("a",))
    assert type(made.share) is float
    with pytest.raises(ConfigError, match="share is 'x'; use a number"):
        Record("x")
