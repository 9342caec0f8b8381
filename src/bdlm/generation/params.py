"""What a request asks of the sampler, checked before any model call, and what it gets back.

In: plain values. Out: frozen `Params`, `Result` and the finish reasons. Knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from bdlm.core.errors import ConfigError, nearest
from bdlm.core.types import ModelSpec
from bdlm.generation.policies import POLICIES, Policy, make_policy

FinishReason = Literal["length", "stop_token", "stop_text", "low_entropy", "cancelled", "error"]


@dataclass(frozen=True)
class Params:
    """One request.

    max_new_tokens: how many to write at most, >= 1. temperature: >= 0 (0 = the most probable token). top_p: nucleus mass in (0, 1];
    nucleus: "standard" keeps the token that crosses top_p, "reference" drops it (spec 4.4). policy: a name of `POLICIES` or an
    object; options: its parameters. seed: of this row alone. stop_tokens: ids that end the text (besides the model's own unless
    `ignore_stop`). stop: strings that end it, also across block borders. min_new_tokens: stop tokens are forbidden before.
    forbidden: ids never written. min_entropy: end the row when the last `entropy_window` tokens' histogram falls below so many
    nats (spec 4.6; None = off). block_size: None = the model's own.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    nucleus: Literal["standard", "reference"] = "standard"
    policy: str | Policy = "first-hitting"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_stop: bool = False
    min_new_tokens: int = 0
    forbidden: tuple[int, ...] = ()
    min_entropy: float | None = None
    entropy_window: int = 256
    block_size: int | None = None

    def __post_init__(self) -> None:
        for holds, name, way_out in (
            (self.max_new_tokens >= 1, "max_new_tokens", "use 1 or more"),
            (self.temperature >= 0, "temperature", "use 0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "use a share in (0, 1]"),
            (self.nucleus in ("standard", "reference"), "nucleus", "use 'standard' or 'reference'"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", f"use 0 to max_new_tokens ({self.max_new_tokens})"),
            (self.min_entropy is None or self.min_entropy >= 0, "min_entropy", "use nats >= 0, or None"),
            (self.entropy_window >= 2, "entropy_window", "use 2 or more tokens"),
            (self.block_size is None or self.block_size >= 1, "block_size", "use 1 or more, or None for the model's own"),
        ):
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; {way_out}")
        if isinstance(self.policy, str):
            object.__setattr__(self, "policy", make_policy(self.policy, self.options))

    @property
    def decoder(self) -> Policy:
        """The policy as an object."""
        assert not isinstance(self.policy, str)
        return self.policy

    def with_(self, **changes: Any) -> Params:
        return replace(self, **changes)


def make_params(**options: Any) -> Params:
    """`Params` from keyword options; those that are not its fields go to the policy; unknown ones are an error with the nearest name."""
    names = {f.name for f in fields(Params)}
    own = {k: v for k, v in options.items() if k in names}
    rest = {k: v for k, v in options.items() if k not in names}
    policy = own.get("policy", "first-hitting")
    if rest:
        if not isinstance(policy, str):
            raise ConfigError(f"option '{next(iter(rest))}' is unknown{nearest(next(iter(rest)), names)}")
        known = names | {f.name for f in fields(POLICIES[policy])} if policy in POLICIES else names
        for name in rest:
            if name not in known:
                raise ConfigError(f"option '{name}' is unknown{nearest(name, known)}")
        own["options"] = {**own.get("options", {}), **rest}
    return Params(**own)


def check_fits(params: Params, prompt: list[int], spec: ModelSpec) -> None:
    """What can be wrong between a request and a model. Raises ConfigError before any call."""
    if not prompt and spec.first_token is None:
        raise ConfigError("the prompt is empty and the model has no first token; give a prompt")
    for name, ids in (("prompt", prompt), ("forbidden", params.forbidden), ("stop_tokens", params.stop_tokens)):
        wrong = [i for i in ids if not 0 <= i < spec.vocab_size]
        if wrong:
            raise ConfigError(f"{name} holds token {wrong[0]}, outside the vocabulary of {spec.vocab_size}; use this model's tokenizer")
    if spec.mask_id in prompt:
        raise ConfigError(f"the prompt holds the mask token ({spec.mask_id}); leave unknown tokens out, or give them as cells to fill")
    if spec.streams == 1 and spec.noise != "none":
        room = spec.max_length - max(len(prompt), 1)
        if params.max_new_tokens > room:
            raise ConfigError(
                f"max_new_tokens is {params.max_new_tokens}, but this whole-sequence model has room for {room} tokens after the prompt"
            )
    size = params.block_size
    if size is not None and size != spec.block_size and (spec.streams == 1 or spec.noise == "none"):
        raise ConfigError(f"block_size is {size}, but this model writes blocks of {spec.block_size}; leave it out")
    params.decoder.check(size or spec.block_size, spec)


@dataclass(frozen=True)
class Result:
    """One finished row. tokens: the new ids, without the stop token. log_probs: of each under the model itself (no temperature, no
    nucleus), nats. model_calls: forwards that the row took part in, cache writes included; engine_calls: all that the engine made
    meanwhile. steps: policy decisions. seconds: from joining to the end."""

    tokens: list[int]
    log_probs: list[float]
    model_calls: int
    engine_calls: int
    seconds: float
    finish_reason: FinishReason
    steps: int = 0
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_call(self) -> float:
        return len(self.tokens) / max(1, self.model_calls)
