"""A request and its record, and the events that it causes.

In: prompts and sampling parameters. Out: `Event` and `RequestOutput`. Knows nothing about models or
tensors."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bdlm.core import randomness
from bdlm.core.blockmap import block_start
from bdlm.generation.sampling_params import FinishReason, RequestOutput, SamplingParams

_RETRY = randomness.purpose("retry")


@dataclass(frozen=True)
class Event:
    """Something that happened to a request.

    request: its number. kind: "draft" (the state of the block being denoised), "commit" (new final
    tokens), "retry" (all committed tokens are taken back, generation starts over) or "end".
    tokens: for "commit", the new ids; the commits since the last retry concatenate to the result's
    `token_ids`. ids, masked: for "draft", the cells of the block, the first `known` of which belong
    to the prompt. result: for "end". error: for "end" with finish reason "error", what was raised.
    """

    request: int
    kind: str
    tokens: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    known: int = 0
    result: RequestOutput | None = None
    error: Exception | None = None


@dataclass
class Request:
    """A request and its record.

    block_size: cells of its blocks. submitted_at, admitted_at: forward passes that the engine had
    made then (passes of an admission in which the request had no part are added later).
    started: seconds, `time.perf_counter`."""

    number: int
    prompt: list[int]
    params: SamplingParams
    block_size: int
    submitted_at: int
    admitted_at: int = 0
    started: float = field(default_factory=time.perf_counter)
    earlier_passes: int = 0  # forward passes of earlier attempts
    num_draft_canvases: int = 0  # of all attempts
    attempt: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Cells of prompt and new tokens together."""
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def seed(self) -> int:
        """The seed of this attempt."""
        if not self.attempt:
            return self.params.seed
        return int(randomness.bits(self.params.seed, _RETRY, self.attempt))

    @property
    def first_block_end(self) -> int:
        """Where the first block ends at the earliest: behind the last known token if
        `infill_mode` is "gap", else 0 (no condition)."""
        if self.params.infill_mode != "gap" or not self.params.known_tokens:
            return 0
        return len(self.prompt) + max(self.params.known_tokens) + 1

    @property
    def widest_block(self) -> int:
        """Cells of the request's widest block."""
        start = block_start(len(self.prompt), self.block_size)
        return min(max(self.block_size, self.first_block_end - start), self.length)

    @property
    def num_unseen_known_tokens(self) -> int:
        """How many known tokens lie in later blocks than cells before them, which therefore are not
        conditioned on them."""
        size, first, known = self.block_size, len(self.prompt), self.params.known_tokens
        unknown = next(
            (first + i for i in range(self.params.max_new_tokens) if i not in known), self.length
        )
        seen = max(block_start(unknown, size) + size, self.first_block_end)
        return sum(first + place >= seen for place in known)

    def restart(self, engine_steps: int) -> None:
        """Begin another attempt. engine_steps: forward passes that the engine has made."""
        self.attempt += 1
        self.earlier_passes += self._passes(engine_steps)

    def _passes(self, engine_steps: int) -> int:
        return (engine_steps - self.admitted_at) * self.params.num_rows

    def output(
        self,
        token_ids: list[int],
        log_probs: list[float],
        reason: FinishReason,
        engine_steps: int | None,
    ) -> RequestOutput:
        """Make the finished record. engine_steps: forward passes that the engine has made; None if
        the request was never admitted."""
        own = 0 if engine_steps is None else self._passes(engine_steps)
        meanwhile = 0 if engine_steps is None else engine_steps - self.submitted_at
        return RequestOutput(
            token_ids,
            log_probs,
            self.earlier_passes + own,
            meanwhile,
            time.perf_counter() - self.started,
            reason,
            self.attempt,
            tuple(self.notes),
            self.num_draft_canvases,
        )
