"""How a training run ended: its result, and a bound of the validation in words. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bdlm.training.run_log import duration


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    reason: "done" (a limit was reached) or the name of the signal that stopped the run. model:
    folder of the exported model, None when the run was stopped. valid: the bounds of the last
    validation."""

    folder: str
    reason: str
    step: int
    tokens: int
    seconds: float
    checkpoint: str
    model: str | None = None
    valid: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.reason}: {self.step:,} steps, {self.tokens:,} tokens, {duration(self.seconds)};"
            f" run in '{self.folder}'"
        ]
        lines += [bound_in_words(self.step, bound) for bound in self.valid]
        if self.model:
            lines.append(f"model in '{self.model}'")
        return "\n".join(lines)


def bound_in_words(step: int, bound: dict[str, Any]) -> str:
    """Write a validation's bound, as `metrics.jsonl` holds it, as one line."""
    bits = bound["bits_per_byte"]
    per_byte = f", {bits:.3f} bits per byte" if bits is not None else ""
    error = "" if bound["stderr"] is None else f" ± {bound['stderr']:.4f}"
    return (
        f"step {step}  held out, blocks of {bound['block_size']}:"
        f" {bound['nats_per_token']:.4f}{error} nats per token, perplexity"
        f" {bound['perplexity']:.2f}{per_byte}"
    )
