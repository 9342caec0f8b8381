"""An experiment's report: its tables and figures from the records alone, as one Markdown page with
PNGs beside it.

In: a `Plan` and the folder of the records. Out: `<results>/<plan>.md` and
`<results>/<plan>-<figure>.png`. Rows whose runs are not recorded yet are said to be missing. Knows
nothing about models; it can be written again at any time."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdlm.data.files import write_atomically
from bdlm.experiments.numbers import Row, collect, entry, smallest_detectable
from bdlm.experiments.pictures import draw
from bdlm.experiments.plan import Plan, Run, Table

Records = dict[str, dict[str, Any]]


def read_records(plan: Plan, results: Path) -> Records:
    """Run name -> record, of the runs that are done, in the plan's order."""
    paths = {run.name: results / plan.name / f"{run.name}.json" for run in plan.runs}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.is_file()
    }


def write_report(plan: Plan, results: Path) -> list[Path]:
    """Write the page and the figures; returns their paths."""
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
    """Records whose run name fits a pattern such as "bd4-s*"."""
    return [record for name, record in records.items() if fnmatch.fnmatchcase(name, pattern)]


def _page(plan: Plan, records: Records, figures: list[Path]) -> Iterator[str]:
    data = " --data FOLDER" if plan.needs else ""
    yield f"# {plan.title}\n"
    if plan.source:
        yield f'> Figures under "published" are the paper\'s ({plan.source}), not ours.\n'
    yield f"**Asked.** {' '.join(plan.claim.split())}\n"
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
    said = (
        f"{len(records)} of {len(runs)} runs recorded, {seconds / 60:.0f} minutes of work in all,"
        f" at {', '.join(commits) or 'no commit'}."
    )
    return said + (f" Not run yet: {', '.join(missing)}." if missing else "")


def _table(table: Table, records: Records) -> Iterator[str]:
    rows = [Row(label, matching(records, pattern)) for label, pattern in table.rows.items()]
    reference = next((row for row in rows if row.label == table.against), None)
    yield f"**{table.title}**\n"
    kept = {
        head: where
        for head, where in table.columns.items()
        if reference and (head in table.compare or not table.compare)
    }
    compared = [f"{head}, less {table.against}" for head in kept]
    published = [f"{head}, published" for head in table.columns] if table.published else []
    yield "| | runs | " + " | ".join([*table.columns, *compared, *published]) + " |"
    yield "| --- |" + " --- |" * (1 + len(table.columns) + len(compared) + len(published))
    for row in rows:
        cells = [entry(collect(row.records, where), table.show) for where in table.columns.values()]
        if reference:
            cells += [row.less(reference, where) for where in kept.values()]
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
