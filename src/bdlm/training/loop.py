"""Training from a config to a run folder: the loop.

In: a `TrainConfig`. Out: a run folder (config.json, checkpoints/, metrics.jsonl, curve.png, model/)
and a `TrainResult`. The model folder holds the averaged weights and the tokenizer, and loads like
any other model.

    python -m bdlm.training.loop RECIPE field=value ...
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from bdlm.core.errors import BdlmError, TrainingError
from bdlm.training.accelerator import StopSignals, lock_run_folder, make_accelerator
from bdlm.training.config import TrainConfig, load_config
from bdlm.training.prepare import TrainingData
from bdlm.training.result import TrainResult
from bdlm.training.run import Run, Sampler


def train(
    config: TrainConfig, sampler: Sampler | None = None, data: TrainingData | None = None
) -> TrainResult:
    """Train until a limit of the config is reached or a signal asks to stop; resumes as
    `config.resume` says.

    sampler: makes the sample text that each validation logs; None logs none. data: windows that the
    caller has prepared; None prepares those that `config.data` names. Raises ConfigError,
    DataError, CheckpointError (bad input, damaged checkpoint, full disk) and TrainingError (loss
    not finite)."""
    accelerator, folder = make_accelerator(config), Path(config.out)
    new = accelerator.is_main_process and not folder.exists()
    with lock_run_folder(folder, accelerator) as check, StopSignals() as stop:
        try:
            run = Run(config, accelerator, folder, sampler, data, check)
        except BdlmError:
            if new:  # a run that could not start leaves nothing behind
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            while True:
                status = run.budget(stop)
                if status.stopped or status.share >= 1:
                    break
                report = run.trainer.step(status.share)
                check()
                run.log(report, status)
                if run.due("valid", status):
                    run.validate(status.share)
                if run.due("save", status):
                    run.save()
            return run.finish(stop, status)
        except OSError as error:
            check()
            # raised by a tracker, for example; unwrapped, it would look like a closed stdout
            if isinstance(error, BrokenPipeError):
                raise TrainingError(
                    f"a pipe broke at step {run.trainer.steps_done}; go on with resume=auto"
                    f" out={folder}"
                ) from error
            raise
        finally:
            run.close()


def main(words: list[str] | None = None) -> int:
    """Run `python -m bdlm.training.loop RECIPE field=value ...`. Returns 0 when the run finished or
    stopped cleanly, 2 for a user error, 1 when training failed."""
    words = sys.argv[1:] if words is None else words
    recipe = words[0] if words and "=" not in words[0] else None
    try:
        result = train(load_config(recipe, words[1:] if recipe else words))
    except BdlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
