"""`bdlm lm-eval`: run tasks of the EleutherAI evaluation harness on a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from bdlm.core.errors import UnsupportedError
from bdlm.core.validation import AtLeast, Count


@dataclass(frozen=True)
class Options:
    """Run tasks of the EleutherAI evaluation harness (optional package lm-eval) on a model.

    Likelihoods are those of --method. Texts are greedy unless a task asks for samples.
    """

    model: str
    """A model folder, or the name of a packaged model."""
    tasks: tuple[str, ...]
    """Names of tasks of the harness, or of tasks in --include-path."""
    include_path: str | None = None
    """Folder with your own task files (YAML)."""
    limit: Count | None = None
    """Number of examples of each task, 1 or more; default all."""
    num_fewshot: Annotated[int, AtLeast(0)] | None = None
    """Number of examples shown before each question, 0 or more; default the task's own."""
    method: str = "nelbo"
    """How to score likelihoods, as in bdlm eval: nelbo, nelbo-exact, exact or k-orders."""
    block_size: Count | None = None
    """Tokens of a block; default the model's own. The weights do not depend on it."""
    replicates: Count = 4
    """Number of independent draws of the noise of methods nelbo and k-orders, 1 or more."""
    decoder: str = "first-hitting"
    """Decoder of generated texts: a name, or package.module:Class."""
    batch_size: int | str = 16
    """Rows of one forward pass, or auto for as many as the memory for logits holds, 64 at most."""
    seed: int = 0
    """Seed of all noise."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, cuda:N, or auto (cuda if there is one)."""
    json: bool = False
    """Print the results as JSON."""


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
