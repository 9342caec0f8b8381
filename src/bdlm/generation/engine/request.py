"""What comes into the engine and what goes out of it: a request with its record, events, and the
bounded queue.

Knows nothing about models or tensors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from bdlm.core import randomness
from bdlm.core.errors import ConfigError
from bdlm.generation.sampling_params import FinishReason, RequestOutput, SamplingParams

_RETRY = randomness.purpose("retry")


@dataclass(frozen=True)
class Event:
    """Something that happened to a request.

    kind: "draft" (the block being written), "commit" (new final tokens), "retry" (what was
    committed is taken back, the text starts anew), "end". tokens: for "commit" the new ids; those
    of all commits since the last retry join to the result's. ids, masked: for "draft" the block's
    cells, the first `known` of them the prompt's. result: for "end". error: what a request that
    ends with reason "error" failed on."""

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
    """A request and its record. calls: the engine's counter when it was submitted and when it took
    its slot."""

    number: int
    prompt: list[int]
    params: SamplingParams
    size: int
    submitted_at: int
    joined_at: int = 0
    started: float = field(default_factory=time.perf_counter)
    spent: int = 0  # forward passes of earlier attempts
    num_draft_canvases: int = 0  # draft canvases of all attempts
    attempt: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Cells of the whole text, prompt included."""
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def seed(self) -> int:
        """The seed of this attempt."""
        return (
            self.params.seed
            if not self.attempt
            else int(randomness.bits(self.params.seed, _RETRY, self.attempt))
        )

    def result(
        self, tokens: list[int], log_probs: list[float], reason: FinishReason, calls: int | None
    ) -> RequestOutput:
        """The finished record. calls: the engine's counter now, None if it never had a slot."""
        own = 0 if calls is None else (calls - self.joined_at) * (2 if self.params.guided else 1)
        meanwhile = 0 if calls is None else calls - self.submitted_at
        seconds = time.perf_counter() - self.started
        return RequestOutput(
            tokens,
            log_probs,
            self.spent + own,
            meanwhile,
            seconds,
            reason,
            self.attempt,
            tuple(self.notes),
            self.num_draft_canvases,
        )


class Queue:
    """Requests that wait for a slot, first come first served; at most `most` of them."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ConfigError(f"queue is {most}; use 1 or more waiting requests")
        self.most, self._waiting = most, deque[Request]()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting)

    def put(self, request: Request) -> None:
        """Raises ConfigError when the queue is full."""
        if len(self._waiting) >= self.most:
            raise ConfigError(
                f"the queue is full ({self.most} requests wait); try again later, or give the"
                " engine a longer queue"
            )
        self._waiting.append(request)

    def back(self, request: Request) -> None:
        """Put one that had a slot before the others, whatever the length."""
        self._waiting.appendleft(request)

    def take(self, slots: int) -> list[Request]:
        """The next requests that fit into so many slots."""
        taken: list[Request] = []
        while self._waiting and slots >= self._waiting[0].params.num_rows:
            taken.append(self._waiting.popleft())
            slots -= taken[-1].params.num_rows
        return taken

    def remove(self, number: int) -> Request | None:
        """Take one out by its number."""
        for request in self._waiting:
            if request.number == number:
                self._waiting.remove(request)
                return request
        return None
