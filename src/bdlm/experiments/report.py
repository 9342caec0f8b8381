"""An experiment's report: its tables and figures from the records alone, as one Markdown page and
PNGs next to it.

In: a `Plan` and the folder of the records. Out: `<results>/<plan>.md` and
`<results>/<plan>-<figure>.png`. The page names runs without a record as missing. Knows nothing
about models; it can be written again at any time."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdlm.data.files import write_atomically
from bdlm.experiments.figures import draw
from bdlm.experiments.plan import Plan, Run, Table
from bdlm.experiments.run_statistics import Row, collect, entry, smallest_detectable

Records = dict[str, dict[str, Any]]


def read_records(plan: Plan, results: Path) -> Records:
    """Read run name -> record of the finished runs, in the plan's order."""
    paths = {run.name: results / plan.name / f"{run.name}.json" for run in plan.runs}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.is_file()
    }


def write_report(plan: Plan, results: Path) -> list[Path]:
    """Write the page and the figures. Returns their paths."""
    records = read_records(plan, results)
    made = []
    for figure in plan.figures:
        rows = {label: matching(records, pattern) for label, pattern in figure.rows.items()}
        if any(rows.values()):
            made.append(draw(figure, rows, results / f"{plan.name}-{figure.name}.png"))
    page = results / f"{plan.name}.md"
    write_atomically(page, ("\n".join(_page(plan, records, made)) + "\n").encode())
    return [page, *made]


def matching(records: Records, pattern: str) -> list[dict[str, Any]]:
    """Select the records whose run name matches a pattern such as "bd4-s*"."""
    return [record for name, record in records.items() if fnmatch.fnmatchcase(name, pattern)]


def _page(plan: Plan, records: Records, figures: list[Path]) -> Iterator[str]:
    data = " --data FOLDER" if plan.needs else ""
    yield f"# {plan.title}\n"
    if plan.source:
        yield f'> Figures under "published" are the paper\'s ({plan.source}), not ours.\n'
    yield f"**Claim.** {' '.join(plan.claim.split())}\n"
    if plan.found:
        yield f"**Found.** {' '.join(plan.found.split())}\n"
    yield f"    bdlm experiment run {plan.name}{data}\n"
    yield _done(plan.runs, records) + "\n"
    for table in plan.tables:
        yield from _table(table, records)
    for path in figures:
        figure = next(f for f in plan.figures if path.stem == f"{plan.name}-{f.name}")
        yield f"![{figure.title}]({path.name})\n"
        yield f"*{' '.join(figure.caption.split())}*\n"


def _done(runs: tuple[Run, ...], records: Records) -> str:
    seconds = sum(sum(record["seconds"].values()) for record in records.values())
    commits = sorted({str(record["commit"]) for record in records.values()})
    missing = [run.name for run in runs if run.name not in records]
    summary = (
        f"{len(records)} of {len(runs)} runs recorded, {seconds / 60:.0f} minutes of work in all,"
        f" at {', '.join(commits) or 'no commit'}."
    )
    return summary + (f" Not run yet: {', '.join(missing)}." if missing else "")


def _table(table: Table, records: Records) -> Iterator[str]:
    rows = [Row(label, matching(records, pattern)) for label, pattern in table.rows.items()]
    reference = next((row for row in rows if row.label == table.against), None)
    yield f"**{table.title}**\n"
    kept = {
        head: value_path
        for head, value_path in table.columns.items()
        if reference and (head in table.compare or not table.compare)
    }
    compared = [f"{head}, less {table.against}" for head in kept]
    published = [f"{head}, published" for head in table.columns] if table.published else []
    yield "| | runs | " + " | ".join([*table.columns, *compared, *published]) + " |"
    yield "| --- |" + " --- |" * (1 + len(table.columns) + len(compared) + len(published))
    for row in rows:
        cells = [
            entry(collect(row.records, value_path), table.show)
            for value_path in table.columns.values()
        ]
        if reference:
            cells += [row.less(reference, value_path) for value_path in kept.values()]
        if published:
            cells += [
                str(table.published.get(row.label, {}).get(head, "-")) for head in table.columns
            ]
        yield f"| {row.label} | {len(row.records)} | " + " | ".join(cells) + " |"
    yield ""
    notes = [" ".join(table.note.split())] if table.note else []
    if reference:
        notes += smallest_detectable(rows, reference, kept)
    if notes:
        yield " ".join(notes) + "\n"
