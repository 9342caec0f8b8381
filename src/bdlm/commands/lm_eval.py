"""`bdlm lm-eval`: tasks of the EleutherAI evaluation harness on a model of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from bdlm.core.errors import UnsupportedError
from bdlm.core.validation import AtLeast, Count


@dataclass(frozen=True)
class Options:
    """Run tasks of the evaluation harness (the package lm-eval, an optional extra) on a model.

    Likelihoods are those of --method; texts are greedy unless a task asks for samples.
    """

    model: str
    """Name or folder of a model."""
    tasks: tuple[str, ...]
    """Names of the harness's tasks, or of those in --include-path."""
    include_path: str | None = None
    """A folder with task files (YAML) of your own."""
    limit: Count | None = None
    """Examples of each task; default all."""
    num_fewshot: Annotated[int, AtLeast(0)] | None = None
    """Examples shown before each question; default the task's own."""
    method: str = "nelbo"
    """nelbo, nelbo-exact, exact, k-orders."""
    block_size: Count | None = None
    """Default the model's own; the weights do not depend on it."""
    replicates: Count = 4
    """Independent draws of the noise of nelbo and k-orders."""
    decoder: str = "first-hitting"
    """How texts are written."""
    batch_size: int | str = 16
    """Rows of one forward, or auto: as many as the memory for logits holds, 64 at most."""
    seed: int = 0
    """Of all noise."""
    device: str = "cpu"
    """cpu, cuda, auto."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    """Print the harness's table."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise UnsupportedError(
            "bdlm lm-eval needs the package lm-eval; pip install 'bdlm[eval]'"
        ) from None
    from bdlm.api import load
    from bdlm.harness.lm_eval import Harness

    own = {
        name: getattr(options, name)
        for name in ("method", "block_size", "replicates", "decoder", "seed")
    }
    found = simple_evaluate(
        Harness(load(options.model, device=options.device), batch_size=options.batch_size, **own),
        tasks=list(options.tasks),
        task_manager=TaskManager(include_path=options.include_path),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    print(json.dumps(found["results"]) if options.json else make_table(found))
