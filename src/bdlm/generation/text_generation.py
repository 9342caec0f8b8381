"""From prompts as text to finished texts: ids, context windows, forward passes that requests share,
and text again.

In: a model, a tokenizer, and requests that are checked but for the model. Out: `RequestOutput` with
text, or `Chunk`s while a text is generated. Knows nothing about where a model comes from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from bdlm.core.errors import BdlmWarning, ConfigError, public_record
from bdlm.core.types import Denoiser, ModelSpec
from bdlm.data.tokenizers import Tokenizer
from bdlm.generation.engine.engine import Event
from bdlm.generation.engine.engine import generate as generate_ids
from bdlm.generation.engine.engine import stream as stream_ids
from bdlm.generation.engine.stopping import TextSearch
from bdlm.generation.engine.streaming import feed
from bdlm.generation.full_sequence.approximate_cache import ApproximateCache
from bdlm.generation.full_sequence.engine import BLOCK, generate_full_sequence
from bdlm.generation.sampling_params import RequestOutput, SamplingParams


@runtime_checkable
class Streamer(Protocol):
    """A streamer of transformers (`TextStreamer`, `TextDiffusionStreamer`): gets the prompt's ids,
    then new ids as they become final, then the end. One with `put_draft` also gets the block that
    is being denoised, with the mask token where it is masked."""

    def put(self, value: Tensor) -> None:
        """Take ids, int64 [1, n] for the prompt and [n] for new tokens."""
        ...

    def end(self) -> None:
        """The text is finished."""
        ...


@public_record
@dataclass(frozen=True)
class Chunk:
    """Something that happened to a text while it is generated.

    kind: "draft", the block being denoised changed: `cells` has the text of each of its cells, None
    where masked. "text": `text` is final and continues what came before. "end": `result` is the
    finished text."""

    kind: Literal["draft", "text", "end"]
    text: str = ""
    cells: tuple[str | None, ...] = ()
    result: RequestOutput | None = None


@dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer for generation. form: returns the model in its form for inference,
    called once for each batch of requests."""

    model: Denoiser
    tokenizer: Tokenizer
    form: Callable[[], Denoiser]

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    # -- whole texts -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        ids: Sequence[list[int]],
        params: Sequence[SamplingParams],
        context_window: int | None = None,
        streamer: Streamer | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt with its own params; requests share forward passes.

        prompts: the texts of `ids`, for the records. context_window: as in `LM.generate`. streamer:
        of one prompt, without retries. Raises ConfigError before any forward pass."""
        windows = self.context_windows(ids, params, context_window)
        if streamer is None:
            results = self._generate(ids, params, windows)
        else:
            if len(ids) != 1 or params[0].retries:
                raise ConfigError(
                    "streamer takes one text that is written once; give one prompt and no retries"
                )
            events = self._events(ids[0], params[0], windows[0], drafts=True)
            results = [feed(streamer, ids[0], events, self.spec.mask_id)]
        return [self.output(*each) for each in zip(prompts, ids, results, windows, params)]

    def generate_cached(
        self,
        prompts: Sequence[str],
        ids: Sequence[list[int]],
        params: Sequence[SamplingParams],
        cache: str | ApproximateCache,
        options: dict[str, int | float],
    ) -> list[RequestOutput]:
        """Continue each prompt under an approximate cache of a full-sequence model, one after the
        other. A note of each result has the share of the work that was computed.

        cache, options: of `full_sequence.approximate_cache`. Raises ConfigError or UnsupportedError
        before any forward pass."""
        size = {p.block_size or BLOCK for p in params}
        if len(size) > 1:
            raise ConfigError(
                f"block_size is {sorted(size)}; with cache, use one for all prompts of a call"
            )
        results = generate_full_sequence(
            self.model,
            ids,
            [p.with_(block_size=None) for p in params],
            cache,
            options=options,
            block=size.pop() if size else BLOCK,
        )
        said = f"cache {cache!r}, an approximation" if isinstance(cache, str) else "this cache"
        texts = []
        for prompt, own, result, each in zip(prompts, ids, results, params):
            note = f"{said}, computed {result.work.share():.1%} of the exact multiply-adds"
            result = replace(result, notes=(*result.notes, note))
            texts.append(self.output(prompt, own, result, None, each))
        return texts

    def _generate(
        self, ids: Sequence[list[int]], params: Sequence[SamplingParams], windows: list[int | None]
    ) -> list[RequestOutput]:
        """The results in the order of the prompts. Requests of one window share forward passes;
        those without a limit join the narrowest window."""
        narrowest = min((w for w in windows if w is not None), default=None)
        windows = [narrowest if w is None else w for w in windows]
        found: dict[int, RequestOutput] = {}
        for window in dict.fromkeys(windows):
            rows = [i for i, own in enumerate(windows) if own == window]
            results = generate_ids(
                self.form(),
                [ids[i] for i in rows],
                [params[i] for i in rows],
                context_window=window,
                decode=self.tokenizer.decode,
            )
            found.update(zip(rows, results, strict=True))
        return [found[i] for i in range(len(ids))]

    def context_windows(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        context_window: int | None,
    ) -> list[int | None]:
        """How far each text looks back: what was asked for, else the training length for texts that
        outgrow it; None for no limit.

        A prompt longer than the training length is looked back on whole, with a warning. Each
        prompt is judged by itself: a text never depends on its neighbours."""
        if context_window is not None:
            return [context_window or None] * len(prompts)
        trained = self.spec.max_length
        slides = self.spec.streams == 2 or self.spec.noise == "none"
        if not slides or "cache" not in self.spec.supports:
            return [None] * len(prompts)
        longest = max(map(len, prompts), default=0)
        if longest > trained:
            warnings.warn(
                f"the prompt has {longest} tokens, more than the {trained} that the model was"
                " trained to look back on; all of it is used: expect worse text, or shorten it",
                BdlmWarning,
                stacklevel=6,
            )
        return [
            None
            if len(prompt) + own.max_new_tokens <= trained
            else max(trained, 2 * min(own.block_size or self.spec.block_size, trained), len(prompt))
            for prompt, own in zip(prompts, params, strict=True)
        ]

    # -- streams -----------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str,
        ids: list[int],
        params: SamplingParams,
        context_window: int | None = None,
        drafts: bool = False,
    ) -> Iterator[Chunk]:
        """Continue one prompt, as chunks. Raises ConfigError before the first chunk is asked
        for."""
        if params.retries:
            raise ConfigError(
                f"retries is {params.retries}, but a stream cannot take text back; use generate,"
                " or 0"
            )
        (window,) = self.context_windows([ids], [params], context_window)
        events = self._events(ids, params, window, drafts)
        return self._chunks(events, prompt, ids, params, window)

    def _events(
        self, ids: list[int], params: SamplingParams, window: int | None, drafts: bool
    ) -> Iterator[Event]:
        return stream_ids(
            self.form(),
            ids,
            params,
            context_window=window,
            decode=self.tokenizer.decode,
            drafts=drafts,
        )

    def _chunks(
        self,
        events: Iterator[Event],
        prompt: str,
        ids: list[int],
        params: SamplingParams,
        window: int | None,
    ) -> Iterator[Chunk]:
        search, told = self._search(ids, params), ""
        for event in events:
            if event.kind == "draft":
                cells = list(zip(event.ids, event.masked, strict=True))[event.known :]
                shown = (None if masked else self.tokenizer.decode([i]) for i, masked in cells)
                yield Chunk("draft", cells=tuple(shown))
            elif event.kind == "commit":
                search.push(event.tokens)
                new = search.settled[len(told) :]
                told += new
                if new:
                    yield Chunk("text", text=new)
            elif event.result is not None:
                result = self.output(prompt, ids, event.result, window, params)
                if len(result.text) > len(told):
                    yield Chunk("text", text=result.text[len(told) :])
                yield Chunk("end", result=result)

    # -- ids and text ------------------------------------------------------------------------------

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt's ids, opened as texts were in training."""
        first, ids = self.spec.first_token, self.tokenizer.encode(utf8("prompt", prompt))
        if first is None and not ids and self.spec.mask_id < 0:  # a causal model from elsewhere
            first = self.tokenizer.bos_id
        return ([] if first is None else [first]) + ids

    def _search(self, ids: list[int], params: SamplingParams) -> TextSearch:
        """What turns the new ids of a request into its text."""
        return TextSearch(self.tokenizer.decode, ids, params.stop, params.min_new_tokens)

    def output(
        self,
        prompt: str,
        ids: list[int],
        result: RequestOutput,
        window: int | None,
        params: SamplingParams,
    ) -> RequestOutput:
        """The engine's record with its text."""
        search = self._search(ids, params)
        search.push(result.token_ids)
        search.finish()
        return replace(
            result, text=search.text, prompt=prompt, prompt_token_ids=ids, context_window=window
        )


def utf8(name: str, value: str) -> str:
    """The value itself if it can be stored as UTF-8. Raises ConfigError."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} holds {value[error.start]!r} at place {error.start}, which is not valid UTF-8;"
            " leave it out"
        ) from None
    return value
