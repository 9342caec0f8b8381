"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdlm.core.errors import ConfigError
from bdlm.core.paths import user_path


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/a") == Path("/home/me/a")
    assert user_path("./~/a") == Path("./~/a") and user_path(Path("a")) == Path("a")
    assert user_path("\udcff.txt") == Path("\udcff.txt"), (
        "a name of a file that is not UTF-8 is a name"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [("~nosuchuser/a", "home folder"), ("a\0b", "NUL byte"), ("\ud800", "no file can be named")],
)
def test_what_is_no_path(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        user_path(name, "--out")
    assert str(error.value).startswith("--out is ")
