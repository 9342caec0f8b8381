"""Values against annotations, and functions that refuse wrong arguments in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from bdlm.core.errors import ConfigError
from bdlm.core.kinds import check_fields, checked, of_kind

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
REFUSED = [  # annotation, value, the way out
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
    found = of_kind("x", value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("hint", "value", "way_out"), REFUSED)
def test_what_does_not_fit_is_named_with_the_way_out(hint: Any, value: Any, way_out: str) -> None:
    with pytest.raises(ConfigError) as error:
        of_kind("x", value, hint)
    assert str(error.value) == f"x is {value!r}; use {way_out}"


def test_a_large_value_is_cut_to_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        of_kind("x", torch.zeros(50, 50), int)
    assert len(str(error.value)) < 130
    assert "\n" not in str(error.value)


def inner(windows: Any, *, seed: int = 0, replicates: int = 4) -> tuple[Any, int, int]:
    return windows, seed, replicates


@checked(inner)
def outer(text: str | Sequence[str], share: float = 0.5, **options: Any) -> tuple[Any, float, dict[str, Any]]:
    """What it is."""
    return text, share, options


@checked()
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
    @checked()
    def broken(x: int) -> int:
        return len(x)

    with pytest.raises(TypeError, match="no len"):
        broken(3)


def test_fields_of_a_record() -> None:
    @dataclass(frozen=True)
    class Record:
        share: float
        names: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            check_fields(self)

    made = Record(1, "a")
    assert made == Record(1.0, ("a",))
    assert type(made.share) is float
    with pytest.raises(ConfigError, match="share is 'x'; use a number"):
        Record("x")
