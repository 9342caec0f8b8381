"""Files around the code are well formed and say one thing: workflow, hooks, templates, citation,
archive record, project metadata."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted(
    path
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    if path.name != "config.yml"
)
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_lints_and_tests_every_supported_python() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert "make lint" in [step.get("run") for step in jobs["lint"]["steps"]]
    assert "make test" in [step.get("run") for step in jobs["test"]["steps"]]
    supported = {
        c.rsplit(" ", 1)[1]
        for c in PROJECT["classifiers"]
        if c.startswith("Programming Language :: Python :: 3.")
    }
    assert set(jobs["test"]["strategy"]["matrix"]["python-version"]) == supported


def test_another_workflow_builds_the_documentation() -> None:
    steps = [
        step.get("run", "") for step in read(".github/workflows/docs.yml")["jobs"]["build"]["steps"]
    ]
    assert any(step.startswith("make docs") for step in steps)
    assert any("tests/docs" in step for step in steps)
    assert any(name.startswith("zensical") for name in PROJECT["optional-dependencies"]["docs"])


def test_hooks_have_what_the_linter_runs() -> None:
    hooks = {
        hook["id"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    }
    assert {"ruff", "ruff-format", "mypy", "check-yaml"} <= hooks


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_needs(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["attributes"]["label"] for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)


def test_there_is_a_form_for_each_kind_of_issue() -> None:
    assert [path.stem for path in FORMS] == ["bug", "feature", "question"]


def test_citation_archive_and_package_agree() -> None:
    citation, archive = read("CITATION.cff"), json.loads((ROOT / ".zenodo.json").read_text())
    assert citation["title"] == archive["title"]
    assert citation["abstract"] == archive["description"]
    assert citation["keywords"] == archive["keywords"] == PROJECT["keywords"]
    assert citation["version"] == archive["version"] == PROJECT["version"]
    assert citation["license"] == archive["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [
        creator["name"] for creator in archive["creators"]
    ]
    assert (
        citation["repository-code"]
        == PROJECT["urls"]["Repository"]
        == archive["related_identifiers"][1]["identifier"]
    )
    assert citation["references"][0]["url"] == PROJECT["urls"]["Paper"]


def test_links_of_the_project_point_to_files_here() -> None:
    home = PROJECT["urls"]["Homepage"]
    for part in ("Documentation", "Changelog"):
        path = PROJECT["urls"][part].removeprefix(home).split("/main/", 1)[1]
        assert (ROOT / path).exists()
