"""What the tests of whole runs share: the smallest config that has every state, and the losses that
a run left behind."""

import json

SMALL = [
    "model.hidden_dim=32",
    "model.n_blocks=2",
    "model.n_heads=2",
    "model.cond_dim=16",
    "model.length=32",
    "model.block_size=4",
    "model.dropout=0.1",
    "block_sizes=[[0.0, 1], [0.4, 2], [0.7, 4]]",
    "optim.batch_size=8",
    "optim.accumulation=2",
    "optim.warmup_steps=3",
    "optim.lr=3e-3",
    "optim.ema=0.9",
    "noise.search=true",
    "noise.search_batches=3",
    "valid.every_steps=4",
    "valid.rows=8",
    "valid.batch_size=4",
    "limits.steps=12",
    "save.every_steps=3",
    "save.every_minutes=null",
    "save.keep=9",
    "log.every_steps=1",
    "log.trackers=[]",
    "log.progress=false",
    "device=cpu",
]


def arguments(text, out, *overrides):
    return [*SMALL, f"data.train=[{text}]", f"out={out}", *overrides]


def losses(folder):
    """step -> loss of every step that the run's metrics hold; a repeated step must repeat its loss
    to the last bit."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        if record["kind"] == "train":
            assert found.setdefault(record["step"], record["loss"]) == record["loss"], record[
                "step"
            ]
    return found
