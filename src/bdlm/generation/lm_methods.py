"""The methods of an `LM` that generate text: `generate`, `stream`, `infill`.

Every option is in their signatures, so that help, editors and type checkers show it. In: prompts as
text or ids, and options. Out: finished texts, or chunks of one. The work is done in
`text_generation`. Knows nothing about where a model comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, overload

from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.validation import Between, validated
from bdlm.data.tokenizers import Tokenizer
from bdlm.generation.call_arguments import params_of_call, params_or_options
from bdlm.generation.decoders import Decoder
from bdlm.generation.full_sequence.approximate_cache import ApproximateCache
from bdlm.generation.sampling_params import RequestOutput, SamplingParams
from bdlm.generation.text_generation import Chunk, Streamer, TextGenerator, utf8

InfillMode = Literal["blocks", "gap", "text"]
ContextWindow = Annotated[int, Between(0, 2**24, said="use 1 to 2^24, or 0 for no limit")]


class GenerationMethods:
    """The methods that generate text, for a class with a tokenizer and a `TextGenerator`."""

    tokenizer: Tokenizer

    @property
    def _text_generator(self) -> TextGenerator:
        raise NotImplementedError

    @validated()
    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids with which `generate` starts: the opening token, as in training, and those
        of the prompt. `Engine` and `generate_from_ids` take them."""
        return self._text_generator.prompt_ids(prompt)

    @overload
    def generate(
        self,
        prompt: str = "",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        nucleus: Literal["standard", "reference"] = "standard",
        min_p: float = 0.0,
        seed: int = 0,
        decoder: str | Decoder = "first-hitting",
        block_size: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        stopping_criteria: Sequence[Callable[..., bool | Tensor]] = (),
        logits_processor: Sequence[Callable[..., Tensor]] = (),
        banned_token_ids: Sequence[int] = (),
        allowed_token_ids: Sequence[int] = (),
        known_tokens: Mapping[int, int] | None = None,
        infill_mode: InfillMode = "blocks",
        guidance_scale: float = 0.0,
        negative_prompt_ids: Sequence[int] = (),
        min_entropy: float | None = None,
        entropy_window: int = 256,
        retries: int = 0,
        context_window: ContextWindow | None = None,
        streamer: Streamer | None = None,
        cache: str | ApproximateCache | None = None,
        cache_options: Mapping[str, int | float] | None = None,
        **decoder_options: Any,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        nucleus: Literal["standard", "reference"] = "standard",
        min_p: float = 0.0,
        seed: int = 0,
        decoder: str | Decoder = "first-hitting",
        block_size: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        stopping_criteria: Sequence[Callable[..., bool | Tensor]] = (),
        logits_processor: Sequence[Callable[..., Tensor]] = (),
        banned_token_ids: Sequence[int] = (),
        allowed_token_ids: Sequence[int] = (),
        known_tokens: Mapping[int, int] | None = None,
        infill_mode: InfillMode = "blocks",
        guidance_scale: float = 0.0,
        negative_prompt_ids: Sequence[int] = (),
        min_entropy: float | None = None,
        entropy_window: int = 256,
        retries: int = 0,
        context_window: ContextWindow | None = None,
        streamer: Streamer | None = None,
        cache: str | ApproximateCache | None = None,
        cache_options: Mapping[str, int | float] | None = None,
        **decoder_options: Any,
    ) -> list[RequestOutput]: ...

    @params_or_options
    @validated()
    def generate(
        self,
        prompt: str | Sequence[str] = "",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        nucleus: Literal["standard", "reference"] = "standard",
        min_p: float = 0.0,
        seed: int = 0,
        decoder: str | Decoder = "first-hitting",
        block_size: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        stopping_criteria: Sequence[Callable[..., bool | Tensor]] = (),
        logits_processor: Sequence[Callable[..., Tensor]] = (),
        banned_token_ids: Sequence[int] = (),
        allowed_token_ids: Sequence[int] = (),
        known_tokens: Mapping[int, int] | None = None,
        infill_mode: InfillMode = "blocks",
        guidance_scale: float = 0.0,
        negative_prompt_ids: Sequence[int] = (),
        min_entropy: float | None = None,
        entropy_window: int = 256,
        retries: int = 0,
        context_window: ContextWindow | None = None,
        streamer: Streamer | None = None,
        cache: str | ApproximateCache | None = None,
        cache_options: Mapping[str, int | float] | None = None,
        **decoder_options: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Continue a prompt, or several at once in shared forward passes.

        A text depends on its prompt, its options and its seed, not on the other prompts of the
        call; prompt i takes seed + i. The options are the fields of `bdlm.SamplingParams`, which
        explains each of them, and may come as one such record in their place: one for all prompts,
        or a list with one each (with the seeds as they are). They are named as in transformers.

        decoder: a name ("first-hitting", "eb", ...), "package.module:Class", or an object.
        decoder_options: the decoder's own parameters by name (docs/decoders.md).
        stopping_criteria: of transformers, functions of (input_ids [1, n], scores) that return a
        bool; asked when a block is finished, for the text up to each of its tokens. scores is None.
        context_window: most tokens to look back on, 0 for no limit. By default the training length
        once the text outgrows it (a longer prompt is used whole, with a warning).
        streamer: of transformers (`TextStreamer`, `TextDiffusionStreamer`), for one prompt.
        cache, cache_options: an approximate cache for full-sequence models (MDLM, SEDD): "prefix"
        or "dual" (Fast-dLLM), "dllm" (dLLM-Cache), "dare-kv", "dare-o" (DARE), "none", and its
        parameters. Blocks of `block_size` (default 32) are then written one after the other.

        Raises ConfigError or UnsupportedError, before any forward pass, for what does not fit."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        params = params_of_call(len(prompts), sampling_params, locals())
        ids = [self._text_generator.prompt_ids(p) for p in prompts]
        if cache is None:
            if cache_options:
                raise ConfigError("cache_options came without a cache; name it: cache='dual'")
            made = self._text_generator.generate(prompts, ids, params, context_window, streamer)
        else:
            if streamer is not None or context_window is not None:
                name = "context_window" if streamer is None else "streamer"
                raise ConfigError(f"{name} does not work with cache; leave one of them out")
            options = dict(cache_options or {})
            made = self._text_generator.generate_cached(prompts, ids, params, cache, options)
        return made[0] if isinstance(prompt, str) else made

    @params_or_options
    @validated()
    def stream(
        self,
        prompt: str = "",
        sampling_params: SamplingParams | None = None,
        *,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        nucleus: Literal["standard", "reference"] = "standard",
        min_p: float = 0.0,
        seed: int = 0,
        decoder: str | Decoder = "first-hitting",
        block_size: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        stopping_criteria: Sequence[Callable[..., bool | Tensor]] = (),
        logits_processor: Sequence[Callable[..., Tensor]] = (),
        banned_token_ids: Sequence[int] = (),
        allowed_token_ids: Sequence[int] = (),
        known_tokens: Mapping[int, int] | None = None,
        infill_mode: InfillMode = "blocks",
        guidance_scale: float = 0.0,
        negative_prompt_ids: Sequence[int] = (),
        min_entropy: float | None = None,
        entropy_window: int = 256,
        retries: int = 0,
        context_window: ContextWindow | None = None,
        drafts: bool = False,
        **decoder_options: Any,
    ) -> Iterator[Chunk]:
        """Generate the same text as `generate`, as chunks while it is generated.

        The chunks of kind "text" join to the text; the last chunk is of kind "end" and holds the
        `RequestOutput`. drafts: also a chunk for every step of the block being denoised. Options as
        in `generate`, without retries. With `min_entropy`, text comes `entropy_window` tokens late:
        the end may lie that far back."""
        for name in ("streamer", "cache", "cache_options"):
            if name in decoder_options:
                raise ConfigError(f"{name} is an option of generate; leave it out of stream")
        (params,) = params_of_call(1, sampling_params, locals())
        generator = self._text_generator
        ids = generator.prompt_ids(prompt)
        return generator.stream(prompt, ids, params, context_window, drafts)

    @params_or_options
    @validated()
    def infill(
        self,
        before: str,
        after: str,
        new_tokens: int = 32,
        sampling_params: SamplingParams | None = None,
        *,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        nucleus: Literal["standard", "reference"] = "standard",
        min_p: float = 0.0,
        seed: int = 0,
        decoder: str | Decoder = "first-hitting",
        block_size: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        stopping_criteria: Sequence[Callable[..., bool | Tensor]] = (),
        logits_processor: Sequence[Callable[..., Tensor]] = (),
        banned_token_ids: Sequence[int] = (),
        allowed_token_ids: Sequence[int] = (),
        infill_mode: InfillMode = "gap",
        guidance_scale: float = 0.0,
        negative_prompt_ids: Sequence[int] = (),
        min_entropy: float | None = None,
        entropy_window: int = 256,
        retries: int = 0,
        context_window: ContextWindow | None = None,
        **decoder_options: Any,
    ) -> RequestOutput:
        """Write `new_tokens` tokens between two texts; the result's text ends with `after`.

        infill_mode: what the new tokens are conditioned on besides `before`: "gap", one block
        reaches over the gap and `after`; "text", one block is the whole text; "blocks", nothing:
        `after` is forced when it is reached, and a note says so. Options as in `generate`; of
        sampling_params, max_new_tokens, known_tokens and infill_mode are replaced."""
        for name in ("max_new_tokens", "known_tokens", "streamer", "cache", "cache_options"):
            if name in decoder_options:
                raise ConfigError(f"{name} does not belong to infill; leave it out")
        if not 1 <= new_tokens < 2**24:
            raise ConfigError(f"new_tokens is {new_tokens}; use 1 to 2^24")
        generator, tail = self._text_generator, self.tokenizer.encode(utf8("after", after))
        own: dict[str, Any] = {
            "max_new_tokens": new_tokens + len(tail),
            "known_tokens": {new_tokens + i: token for i, token in enumerate(tail)},
            "infill_mode": infill_mode,
        }
        params = params_of_call(1, sampling_params, locals(), **own)
        ids = generator.prompt_ids(before)
        return generator.generate([before], [ids], params, context_window)[0]

    @validated()
    def generate_from_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        *,
        context_window: ContextWindow | None = None,
    ) -> list[RequestOutput]:
        """Continue token ids as they are: no opening token is put before them.

        sampling_params, context_window: as in `generate`. Raises ConfigError, before any forward
        pass, for what does not fit."""
        params = params_of_call(len(prompts), sampling_params, {})
        ids = [list(prompt) for prompt in prompts]
        texts = [self.tokenizer.decode(own) for own in ids]
        return self._text_generator.generate(texts, ids, params, context_window)
