"""`bdlm experiment run | report | launch | list`: execute plans of training runs and measurements,
and write their reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from bdlm.core.errors import ConfigError
from bdlm.core.paths import user_path
from bdlm.core.validation import Count


@dataclass(frozen=True)
class Options:
    """Execute the runs of a plan that have no record yet, record each, and write the report.

    You can stop the command at any time; the same command resumes.
    """

    what: Positional[Literal["run", "report", "launch", "list"]]
    """run executes the runs and writes the report; report writes the tables and figures of the
    recorded runs; launch prints the commands that train a plan's models on several devices (run
    then measures them); list prints the known plans."""
    name: Positional[str] = ""
    """Name of a known plan, or a YAML file with your own."""
    data: str | None = None
    """Folder with the published texts that the plan reads (wikitext-2/train.txt.gz, ...)."""
    out: str = "runs/experiments"
    """Folder for the checkpoints and models of the runs."""
    results: str = "runs/results"
    """Folder for the reports and the records, one JSON file per run."""
    only: tuple[str, ...] = ()
    """Names of runs to execute, without a report; default all runs, with a report."""
    processes: Count = 8
    """Number of devices per machine in the commands of launch, 1 or more."""
    json: bool = False
    """Print JSON: the list of plans, or the paths of the files written."""


def run(options: Options) -> None:
    """Run, report, launch or list, as `what` says."""
    if options.what != "list" and not options.name:
        raise ConfigError(
            f"bdlm experiment {options.what} needs the name of a plan; `bdlm experiment list`"
            " prints the names"
        )
    {"run": _run, "report": _report, "launch": _launch, "list": _list}[options.what](options)


def _list(options: Options) -> None:
    from bdlm.experiments.plan import load_plan, plan_names

    plans = [load_plan(name) for name in plan_names()]
    if options.json:
        print(
            json.dumps(
                [
                    {"name": p.name, "title": p.title, "runs": len(p.runs), "minutes": p.minutes}
                    for p in plans
                ]
            )
        )
        return
    width = max(len(plan.name) for plan in plans)
    for plan in plans:
        long = f"about {plan.minutes:g} minutes" if plan.minutes else "not timed"
        print(f"{plan.name:<{width}}  {len(plan.runs):>3} runs, {long:<17}  {plan.title}")
    print(
        "Most plans start from models of other plans: run base first, then likelihood, then the"
        " rest. A run whose starting model is missing names the plan to run first."
    )


def _plan(options: Options) -> Any:
    from bdlm.experiments.corpora import places
    from bdlm.experiments.plan import load_plan

    needs = load_plan(options.name, options.out).needs
    return load_plan(
        options.name, options.out, places(needs, options.data, user_path(options.out, "--out"))
    )


def _run(options: Options) -> None:
    from bdlm.experiments.runner import run_plan

    plan = _plan(options)
    say = (lambda line: None) if options.json else print
    done = run_plan(
        plan,
        user_path(options.out, "--out"),
        user_path(options.results, "--results"),
        options.only,
        say=say,
    )
    if options.json:
        print(json.dumps([str(path) for path in done]))
    elif not options.only:
        _report(options)


def _launch(options: Options) -> None:
    from bdlm.experiments.runner import recipes

    folders = user_path(options.out, "--out"), user_path(options.results, "--results")
    for recipe in recipes(_plan(options), *folders, options.only):
        print(
            f"accelerate launch --num_processes {options.processes} -m bdlm.training.loop {recipe}"
        )


def _report(options: Options) -> None:
    from bdlm.experiments.plan import load_plan
    from bdlm.experiments.report import write_report

    made = write_report(
        load_plan(options.name, options.out), user_path(options.results, "--results")
    )
    print(json.dumps([str(path) for path in made]) if options.json else "\n".join(map(str, made)))
