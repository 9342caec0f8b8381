"""Sampling parameters of a request, checked before any forward pass, and the record of a finished
text.

In: plain values. Out: frozen `SamplingParams` and `RequestOutput`. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import torch

from bdlm.core.errors import ConfigError, nearest, public_record
from bdlm.core.types import ModelSpec
from bdlm.core.validation import AtLeast, Between, Count, Utf8, coerce, validate_fields
from bdlm.generation.decoders import DECODERS, Decoder, decoder_class, make_decoder
from bdlm.generation.decoders.revising import LeftToRight

FinishReason = Literal[
    "length",
    "stop_token",
    "stop_text",
    "stopping_criteria",
    "low_entropy",
    "cancelled",
    "error",
]


# transformers' processors that look at the scores, or at the set of known tokens, but not at the
# order in which positions are filled
ANY_ORDER = frozenset(
    {
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)


@public_record
@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for.

    Length: max_new_tokens, at most, >= 1. min_new_tokens: nothing ends the text before. stop:
    strings that end it, also across block borders. stop_token_ids: ids that end it, besides the
    model's own (`ignore_eos` turns that one off). stopping_criteria: of transformers, see
    `criteria_end`.

    Sampling: temperature, >= 0 (0 takes the most probable token). top_k: only the k most probable
    tokens, 0 = all. top_p: nucleus mass in (0, 1]; nucleus: "standard" keeps the token that crosses
    top_p, "reference" drops it. min_p: only tokens with at least this share of the greatest
    probability, after temperature, in [0, 1]. banned_token_ids: never written; allowed_token_ids:
    the only ones written. logits_processor: of transformers; those that take `cur_step` get the
    number of steps that the block may still take. seed: of this row.

    Decoding: decoder, a name of `DECODERS` or an object; options: its parameters. block_size: None
    = the model's own.

    Guidance: guidance_scale w >= 0, 0 = off: (1 + w) log p - w log p(. | negative_prompt_ids),
    where the negative prompt ends where the prompt ends. This is LLaDA's scale; that of
    transformers is 1 + w.

    Infilling: known_tokens, new tokens known beforehand by place (0 = the first after the prompt).
    infill_mode: what is conditioned on known tokens of later blocks: "blocks" nothing (they are
    forced when reached), "gap" the first block reaches over the last of them, "text" one block is
    the whole text.

    Degenerate text: min_entropy ends the row when the histogram of the last `entropy_window` tokens
    has less entropy, in nats (None = off; App. C.5 of arXiv 2503.09573). retries: how often it is
    then written again, from a seed derived from its own.

    Raises ConfigError for a value out of range."""

    max_new_tokens: Count = 256
    temperature: Annotated[float, AtLeast(0, "use 0 (greedy) or more, a finite number")] = 1.0
    top_p: Annotated[float, Between(0, 1, "(]", "use a share in (0, 1]")] = 1.0
    nucleus: Literal["standard", "reference"] = "standard"
    top_k: Annotated[int, AtLeast(0, "use a number of tokens, or 0 for all")] = 0
    min_p: Annotated[
        float,
        Between(0, 1, said="use a share of the greatest probability in [0, 1], 0 for all tokens"),
    ] = 0.0
    decoder: str | Decoder = "first-hitting"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    block_size: Annotated[int, AtLeast(1, "use 1 or more, or None for the model's own")] | None = (
        None
    )
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[Annotated[str, Utf8()], ...] = ()
    stopping_criteria: tuple[Callable[..., bool | torch.Tensor], ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    banned_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    min_entropy: Annotated[float, AtLeast(0, "use nats >= 0, or None")] | None = None
    entropy_window: Annotated[int, AtLeast(2, "use 2 or more tokens")] = 256
    retries: Annotated[int, Between(0, 100, said="use 0 to 100")] = 0
    known_tokens: Mapping[int, int] = field(default_factory=dict)
    infill_mode: Literal["blocks", "gap", "text"] = "blocks"
    logits_processor: tuple[Any, ...] = ()
    guidance_scale: Annotated[float, AtLeast(0, "use 0 (off) or more, a finite number")] = 0.0
    negative_prompt_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        validate_fields(self)
        last = self.max_new_tokens - 1
        for holds, name, fix in (
            (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                f"use 0 to max_new_tokens ({self.max_new_tokens})",
            ),
            (
                not self.retries or self.min_entropy is not None,
                "retries",
                "set min_entropy, which says when a text is written again",
            ),
            (
                all(0 <= place <= last for place in self.known_tokens),
                "known_tokens",
                f"use places from 0 to max_new_tokens - 1 ({last})",
            ),
            (
                len(self.known_tokens) < self.max_new_tokens,
                "known_tokens",
                "leave at least one token to write",
            ),
            (all(self.stop), "stop", "leave out the empty text: every text begins with it"),
        ):
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; {fix}")
        if isinstance(self.decoder, str):
            object.__setattr__(self, "decoder", make_decoder(self.decoder, self.options))
        flat = [
            q for p in self.logits_processor for q in (p if isinstance(p, list | tuple) else (p,))
        ]
        object.__setattr__(self, "logits_processor", tuple(flat))

    @property
    def decoder_object(self) -> Decoder:
        """The decoder as an object."""
        assert not isinstance(self.decoder, str)
        return self.decoder

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 0

    @property
    def num_rows(self) -> int:
        """Rows of the engine that the request takes."""
        return 2 if self.guided else 1

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed. Raises ConfigError as the constructor does."""
        return replace(self, **changes)


def sampling_params(beside: Iterable[str] = (), /, **options: Any) -> SamplingParams:
    """Make `SamplingParams` from keyword options; those that are not its fields go to the decoder.

    beside: names that the caller takes itself, for the error about an unknown option, which names
    the nearest one."""
    names = {f.name for f in fields(SamplingParams)}
    own = {k: v for k, v in options.items() if k in names}
    rest = {k: v for k, v in options.items() if k not in names}
    decoder = own.get("decoder", "first-hitting")
    if rest:
        known = names | set(beside)
        if isinstance(decoder, str):
            known |= {f.name for f in fields(decoder_class(decoder))}
        for name in rest:
            if name not in known - set(beside):
                fix = _decoders_with(name) or nearest(name, known - {name})
                raise ConfigError(f"option '{name}' is unknown{fix}")
        own["options"] = {**coerce("options", own.get("options", {}), Mapping[str, Any]), **rest}
    return SamplingParams(**own)


def _decoders_with(name: str) -> str:
    """The end of a message about a parameter of other decoders than the chosen one."""
    owners = [own for own, kind in DECODERS.items() if name in {f.name for f in fields(kind)}]
    if not owners:
        return ""
    several = f" (also of {', '.join(owners[1:])})" if len(owners) > 1 else ""
    return f"; it is a parameter of decoder '{owners[0]}'{several}: choose that decoder"


def criteria_end(
    params: SamplingParams, prompt: Sequence[int], ids: Sequence[int], fresh: int
) -> int | None:
    """Count the new tokens up to the first at which a stopping criterion says yes; None if none
    does.

    The engine asks when a block is finished: criterion(input_ids [1, n] int64, None) -> bool or a
    tensor of bools, for the text up to each of the block's tokens in turn, as transformers asks
    after every token. What the block holds behind that token is dropped. Tokens before
    `min_new_tokens` are not asked about.

    prompt, ids: the prompt and the new tokens so far; the last `fresh` of `ids` are to be asked
    about."""
    for count in range(max(len(ids) - fresh, params.min_new_tokens - 1) + 1, len(ids) + 1):
        row = torch.tensor([[*prompt, *ids[:count]]], dtype=torch.long)
        if any(bool(torch.as_tensor(ask(row, None)).any()) for ask in params.stopping_criteria):
            return count
    return None


def check_fits(params: SamplingParams, prompt: list[int], spec: ModelSpec) -> None:
    """Refuse a request that does not fit a model. Raises ConfigError before any forward pass."""
    if not prompt and spec.first_token is None:
        raise ConfigError("the prompt is empty and the model has no first token; give a prompt")
    for name, ids in (
        ("prompt", prompt),
        ("banned_token_ids", params.banned_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("known_tokens", params.known_tokens.values()),
        ("negative_prompt_ids", params.negative_prompt_ids),
    ):
        wrong = [i for i in ids if not 0 <= i < spec.vocab_size]
        if wrong:
            raise ConfigError(
                f"{name} holds token {wrong[0]}, outside the vocabulary of {spec.vocab_size}; use"
                " this model's tokenizer"
            )
        if (
            name in ("known_tokens", "negative_prompt_ids", "allowed_token_ids")
            and spec.mask_id in ids
        ):
            raise ConfigError(f"{name} holds the mask token ({spec.mask_id}); leave it out")
    never = {*params.banned_token_ids, *spec.never_written}
    if len(never) == spec.vocab_size or (
        params.allowed_token_ids and never.issuperset(params.allowed_token_ids)
    ):
        raise ConfigError("banned_token_ids leaves no token to write; forbid fewer, or allow more")
    if spec.mask_id in prompt:
        raise ConfigError(
            f"the prompt holds the mask token ({spec.mask_id}); leave unknown tokens out, or give"
            " what follows them as known_tokens"
        )
    read = max(len(prompt), 1) + params.max_new_tokens - (spec.noise == "none")
    if spec.max_position is not None and read > spec.max_position:
        raise ConfigError(
            f"the prompt's {len(prompt)} tokens and max_new_tokens ({params.max_new_tokens}) are"
            f" more than the {spec.max_position} positions that this model has; ask for fewer"
        )
    if spec.streams == 1 and spec.noise != "none":
        room = spec.max_length - max(len(prompt), 1)
        if params.max_new_tokens > room:
            raise ConfigError(
                f"max_new_tokens is {params.max_new_tokens}, but this full-sequence model has room"
                f" for {room} tokens after the prompt"
            )
    if spec.noise == "uniform":
        raise ConfigError(
            "this model was trained with uniform noise, but every decoder here reverses mask noise;"
            " it can be scored, not sampled"
        )
    size = params.block_size
    if size is not None and size != spec.block_size and (spec.streams == 1 or spec.noise == "none"):
        raise ConfigError(
            f"block_size is {size}, but this model writes blocks of {spec.block_size}; leave it out"
        )
    if size is not None and size > spec.max_length:
        raise ConfigError(
            f"block_size is {size}, but the model's window has {spec.max_length} cells; use 1 to"
            f" {spec.max_length}"
        )
    if params.infill_mode != "blocks" and (
        spec.shift or spec.noise == "none" or spec.context == "causal"
    ):
        raise ConfigError(
            f"infill_mode is '{params.infill_mode}', but this model's cells see nothing to their"
            " right; use 'blocks'"
        )
    if params.guided and spec.shift:
        raise ConfigError(
            f"guidance_scale is {params.guidance_scale}, but this model's logits are shifted, which"
            " guidance does not cover; use 0"
        )
    ahead, state = (
        "draft_canvases" in params.decoder_object.needs,
        "hidden" in params.decoder_object.needs,
    )
    if params.guided and (ahead or state):
        what = "that try several canvases" if ahead else "that read the model's state"
        raise ConfigError(
            f"guidance_scale is {params.guidance_scale}, which decoders {what} do not cover; use"
            " another decoder, or 0"
        )
    if params.logits_processor and ahead:
        raise ConfigError(
            "logits_processor cannot follow a decoder that tries several canvases; use decoder"
            " 'first-hitting', or leave them out"
        )
    params.decoder_object.check(block_of(params, len(prompt), spec), spec)
    _check_processors(params, spec)


def block_of(params: SamplingParams, prompt: int, spec: ModelSpec) -> int:
    """Number of positions of a request's blocks (the whole text where one block is the text)."""
    if (spec.streams == 1 and spec.noise != "none") or params.infill_mode == "text":
        return prompt + params.max_new_tokens
    return params.block_size or spec.block_size


def _check_processors(params: SamplingParams, spec: ModelSpec) -> None:
    """Refuse processors that read the text from left to right unless it is written so."""
    size = params.block_size or spec.block_size
    if (
        (size == 1 and spec.streams == 2)
        or spec.noise == "none"
        or isinstance(params.decoder_object, LeftToRight)
    ):
        return
    for processor in params.logits_processor:
        name = type(processor).__name__
        if name not in ANY_ORDER and not getattr(processor, "any_order", False):
            raise ConfigError(
                f"logits_processor holds {name}, which reads the text from the left, but cells are"
                " filled in any order; use decoder 'left-to-right', or set its attribute any_order"
                " if it does not mind"
            )


@public_record
@dataclass(frozen=True)
class RequestOutput:
    """A finished text. `LM` fills in all fields; the engine knows ids only and leaves `text`,
    `prompt` and `context_window` empty.

    text: the new text, without the prompt. token_ids: the new ids, without the stop token (known
    tokens are among them). log_probs: of each under the model itself, in nats, without temperature
    and filters (0 for known tokens; with guidance, of the guided distribution).
    forward_passes: all that its rows took part in, cache writes and retries included; engine_steps:
    all that the engine made since the request was submitted. seconds: from taking its slot to the
    end. finish_reason: "length", "stop_token", "stop_text", "stopping_criteria", "low_entropy",
    "cancelled" or "error". retries: how often it was written again.
    notes: what else is worth knowing, in sentences. num_draft_canvases: canvases that its decoder
    had predicted in the same forward passes (speculation, WINO), which forward_passes does not
    show. context_window: most tokens that it looked back on at once, None for no limit."""

    text: str = field(default="", kw_only=True)
    prompt: str = field(default="", kw_only=True, repr=False)
    prompt_token_ids: list[int] = field(default_factory=list, kw_only=True, repr=False)
    token_ids: list[int] = field(repr=False)
    log_probs: list[float] = field(repr=False)
    forward_passes: int
    engine_steps: int
    seconds: float
    finish_reason: FinishReason
    retries: int = 0
    notes: tuple[str, ...] = ()
    num_draft_canvases: int = 0
    context_window: int | None = field(default=None, kw_only=True)

    @property
    def tokens(self) -> int:
        """Number of new tokens."""
        return len(self.token_ids)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forward passes."""
        return len(self.token_ids) / max(1, self.forward_passes)

    @property
    def sequences(self) -> list[int]:
        """Ids of the prompt and the new tokens, as in the output of transformers' `generate`."""
        return [*self.prompt_token_ids, *self.token_ids]
