"""The reference has every public name, field, command and member; the site has no dead link."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_type_hints

import pytest
import yaml

import bdlm
from bdlm import cli
from bdlm.core.schedules import SCHEDULES
from bdlm.core.validation import Between, Count
from bdlm.generation.decoders import DECODERS
from bdlm.training.config import TrainConfig, recipe_names
from docs.site.build import ROOT, build, sources, stage
from docs.site.docstrings import document, fields_of, signature, table, written
from docs.site.reference import link_names, pages
from tests.docs.links import broken_site_links


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return pages()


def config_fields(kind: Any = TrainConfig, prefix: str = "") -> list[str]:
    hints, found = get_type_hints(kind), []
    for f in dataclasses.fields(kind):
        inner = hints[f.name]
        nested = dataclasses.is_dataclass(inner)
        found += config_fields(inner, f"{prefix}{f.name}.") if nested else [f"{prefix}{f.name}"]
    return found


@pytest.mark.parametrize("name", bdlm.__all__)
def test_every_public_name_has_an_entry(name: str, reference: dict[str, str]) -> None:
    assert sum(f"{{ #bdlm.{name} }}" in page for page in reference.values()) == 1


def test_public_names_are_linked_in_prose_only() -> None:
    text = "# `bdlm.load`\n\nSee `bdlm.load` and `bdlm.nothing`.\n\n```python\n# `bdlm.load`\n```\n"
    linked = text.replace("See `bdlm.load`", "See [`bdlm.load`](api.md#bdlm.load)")
    assert link_names(text) == linked


@pytest.mark.parametrize("name", config_fields())
def test_every_field_of_a_config_has_its_row(name: str, reference: dict[str, str]) -> None:
    rows = [
        r
        for r in reference["reference/config.md"].splitlines()
        if f'<a id="config.{name}"></a>' in r
    ]
    assert len(rows) == 1
    cells = rows[0].strip("|").rsplit("|", 1)
    assert cells[-1].strip(" |`"), f"{name} has no sentence"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_is_there_with_its_options(name: str, reference: dict[str, str]) -> None:
    text = reference["reference/commands.md"].split(f"{{ #bdlm-{name} }}")[1].split("\n## ")[0]
    module = cli.command(name)
    if name == "train":
        assert all(f"`--{short}`" in text for short in module.SHORT)
        return
    for f in dataclasses.fields(module.Options):
        assert f.name.replace("_", "-") in text.replace("_", "-")


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("decoders", list(DECODERS)),
        ("schedules", list(SCHEDULES)),
        ("recipes", list(recipe_names())),
    ],
)
def test_every_registered_member_is_listed(
    page: str, names: list[str], reference: dict[str, str]
) -> None:
    assert names
    assert [name for name in names if f"`{name}`" not in reference[f"reference/{page}.md"]] == []


def test_every_page_is_in_the_navigation(tmp_path: Path) -> None:
    written_pages = {str(page) for page in stage(tmp_path / "docs")}
    named = set(navigation())
    assert named <= written_pages
    folders = {".", "guides", "tutorials", "reference"}
    assert {page for page in written_pages if str(PurePosixPath(page).parent) in folders} <= named


def navigation() -> list[str]:
    class Loader(yaml.SafeLoader):
        """Takes the tag that names a function for what it is: nothing to call here."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    pages, rest = [], list(nav)
    while rest:
        item = rest.pop()
        for value in item.values():
            if isinstance(value, str):
                pages.append(value)
            else:
                rest += value
    return pages


def test_programs_and_records_are_not_copied() -> None:
    kinds = {path.suffix for path, _ in sources()}
    assert ".md" in kinds
    assert not kinds & {".py", ".json"}


@pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None,
    reason="Zensical is not installed: pip install 'bdlm[docs]'",
)
def test_the_built_site_has_no_dead_link(tmp_path: Path) -> None:
    site = build(tmp_path)
    for page in navigation():
        assert (site / page).with_suffix(".html").is_file()
    assert broken_site_links(site) == []


# -- how docstrings become Markdown ----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (Literal["a", "b"] | None, "a | b or null"),
        (Count | None, "int >= 1 or null"),
        (Annotated[float, Between(0, 1, "(]")], "float in (0, 1]"),
        (tuple[str, ...], "tuple[str, ...]"),
        (Mapping[int, Path], "Mapping[int, Path]"),
        ("Unknown | None", "Unknown or null"),
    ],
)
def test_types_are_written_as_values(kind: Any, shown: str) -> None:
    assert written(kind) == shown


def test_tables_have_as_many_cells_in_each_row(reference: dict[str, str]) -> None:
    for name, page in reference.items():
        for part in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
            rows = [re.sub(r"`[^`]*`|\\\|", "", row).count("|") for row in part.splitlines()]
            assert len(set(rows)) == 1, f"{name}: {part}"


def test_signatures_hold_no_quotes_around_types() -> None:
    def short(self: Any, text: str, *, size: int | None = None) -> list[str]:
        return [text] * (size or 1)

    assert signature("short", short) == "short(text: str, *, size: int | None = None) -> list[str]"


def test_docstrings_keep_code_and_show_stars() -> None:
    shown = document("Mean of a * b, `x * y`.\n\n    f(x)\n\nEnd.")
    assert shown == "Mean of a \\* b, `x * y`.\n\n```python\nf(x)\n```\n\nEnd."


def test_described_arguments_become_a_list() -> None:
    text = """Do it.\n\nfirst, second: two numbers. third: a name; may\nbe empty. Raises Error."""
    shown = document(text, ["first", "second", "third"])
    about = "- `first`, `second`: two numbers.\n- `third`: a name; may be empty."
    assert shown == f"Do it.\n\n{about}\n\nRaises Error."
    assert document(text, ["first", "second", "third"], listed=False) == "Do it.\n\nRaises Error."
    assert document(text, ["other"]) == text
    assert document(None) == ""


def test_fields_take_their_sentences_from_the_docstring() -> None:
    @dataclasses.dataclass
    class Record:
        """A record. first, second: two numbers, >= 0. third: a name; may be empty."""

        first: int
        second: int = 2
        third: str = ""

    rows = fields_of(Record)
    assert [row[3] for row in rows] == [
        "two numbers, >= 0.",
        "two numbers, >= 0.",
        "a name; may be empty.",
    ]
    assert rows[1][2] == "`2`"
    assert "| `first` | `int` | required |" in table(rows)
