"""The three-line face: load a model, write with it, score with it; and train one from a config.

In: names, paths, text. Out: text, numbers, a run folder. This is where the layers below meet: a
model and its tokenizer become an `LM`, prompts become ids for the engine, texts become windows for
the likelihood. Holds no algorithm of its own.

    lm = bdlm.load("shakespeare")
    print(lm.generate("MACBETH:\\n", max_new_tokens=200, decoder="eb", top_p=0.9).text)
    print(lm.score("Tomorrow, and tomorrow, and tomorrow"))
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import torch

from bdlm.core.devices import device_of_name, dtype_of_name
from bdlm.core.errors import BdlmWarning, CheckpointError, ConfigError, shown
from bdlm.core.threads import survive_fork
from bdlm.core.types import Denoiser, ModelSpec
from bdlm.core.validation import validated
from bdlm.data.packing import Packing, prepare
from bdlm.data.tokenizers import Tokenizer, check_fits, load_tokenizer
from bdlm.generation.engine.engine import Event
from bdlm.generation.engine.engine import generate as write_ids
from bdlm.generation.engine.engine import stream as stream_ids
from bdlm.generation.engine.stopping import TextSearch
from bdlm.generation.engine.streaming import feed
from bdlm.generation.sampling_params import RequestOutput, SamplingParams, sampling_params
from bdlm.likelihood.bound import evaluate as evaluate_rows
from bdlm.likelihood.bound import fit_counts
from bdlm.likelihood.rows import arranged, sliding, stride_of, whole_documents
from bdlm.likelihood.score import Score as Score
from bdlm.models import model_folder
from bdlm.models.hf import HFDenoiser
from bdlm.models.inference_form import InferenceFormCache
from bdlm.training.config import TrainConfig
from bdlm.training.loop import TrainResult as TrainResult
from bdlm.training.loop import train as train_loop

# what the two writing methods take beside a request's options
OF_STREAM = ("prompt", "drafts", "window")
OF_GENERATE = ("prompt", "streamer", "window")


@dataclass(frozen=True)
class Generated:
    """One text. tokens: how many were written. ids, log_probs: of each, log_probs in nats under the
    model itself (no temperature).

    forward_passes: every forward that this text took part in, cache writes and retries included;
    engine_steps: all that were made meanwhile.
    tokens_per_forward: tokens / forward_passes. retries: how often it was written anew. seconds:
    from its start to its end.
    finish_reason: "length", "stop_token", "stop_text", "low_entropy".
    window: most tokens that it looked back on at once; None: all of them, which fit the training
    length or were asked for (window=0)."""

    text: str
    prompt: str
    tokens: int
    forward_passes: int
    tokens_per_forward: float
    seconds: float
    finish_reason: str
    ids: list[int] = field(repr=False)
    log_probs: list[float] = field(repr=False)
    notes: tuple[str, ...] = ()
    window: int | None = None
    engine_steps: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Chunk:
    """Something that happened to a text that is being written.

    kind "draft": cells of the block being written, text of each or None where still masked. "text":
    new final text. "end": the result."""

    kind: Literal["draft", "text", "end"]
    text: str = ""
    cells: tuple[str | None, ...] = ()
    result: Generated | None = None


@dataclass(frozen=True)
class LM:
    """A model with its tokenizer. Made by `load`; or by hand from any `Denoiser` and any tokenizer.

    path: where it was loaded from. notes: what the load report says. compile: write with
    torch.compile (`load`). Any number of threads may use one at once. Results follow the weights:
    they may change between calls."""

    model: Any
    tokenizer: Tokenizer
    path: Path | None = None
    notes: tuple[str, ...] = ()
    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, Denoiser):
            raise ConfigError(
                f"model is {shown(self.model)}; use a Denoiser (spec, new_cache, step), or"
                " bdlm.load(name)"
            )
        if not (hasattr(self.tokenizer, "encode") and hasattr(self.tokenizer, "decode")):
            raise ConfigError(
                f"tokenizer is {shown(self.tokenizer)}; use one of"
                " bdlm.data.tokenizers.load_tokenizer(name)"
            )
        self.__dict__["_inference_form"] = InferenceFormCache(self.model, self.compile)

    @property
    def spec(self) -> ModelSpec:
        """The conventions of the model: vocabulary, block size, window, kind of noise."""
        return self.model.spec

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.model.parameters())).dtype

    # -- likelihood --------------------------------------------------------------------------------

    @validated(evaluate_rows)
    def score(
        self,
        text: str | Sequence[str],
        method: str = "nelbo",
        block_size: int | None = None,
        **options: Any,
    ) -> Score:
        """Likelihood of a text, or of several taken together: each from its start, with all that
        came before in view.

        method: "nelbo" (Monte-Carlo bound), "nelbo-exact", "exact" or "k-orders"; at block size 1
        and for autoregressive models the figure is exact whatever the method. options: of
        `bdlm.likelihood.bound.evaluate` (replicates, seed, target_stderr, estimator, ...). Texts
        longer than the training length go through a window that moves by half of it."""
        texts = [text] if isinstance(text, str) else text
        documents, first, room = (
            [self.tokenizer.encode(_utf8("text", t)) for t in texts],
            self.spec.first_token,
            self.spec.max_length,
        )
        if max(map(len, documents), default=0) + (first is not None) <= room:
            rows = whole_documents(documents, first)
        else:
            rows = sliding(
                documents, room, stride_of(room, block_size or self.spec.block_size), first
            )
        return self._scored("score", rows, method=method, block_size=block_size, **options)

    @validated(evaluate_rows)
    def evaluate(
        self,
        data: str | Path | Sequence[str | Path],
        method: str = "nelbo",
        block_size: int | None = None,
        *,
        length: int | None = None,
        field: str = "text",
        split: str = "file",
        detokenizer: str = "none",
        bad_records: float = 0.01,
        document_mask: bool = False,
        view: str = "packed",
        stride: int | None = None,
        document_tokens: int | None = None,
        fit_on: str | Path | Sequence[str | Path] | None = None,
        **options: Any,
    ) -> Score:
        """Likelihood of files, folders or named datasets, packed into windows as in training (the
        first cell of each is given).

        length: of a window, default the training length. field, split, detokenizer, bad_records:
        how data becomes documents, `data.packing.prepare`.
        view: "packed" windows, a "sliding" window that moves by `stride`, or whole "documents"
        (`bdlm.likelihood.rows.arranged`).
        document_tokens: in the last two, keep so many cells from the start of each document, an
        opening token among them.
        fit_on: other data, for estimator "importance". method, options (max_tokens, ...): as in
        `score`."""
        packing = Packing(
            self.spec.max_length if length is None else length,
            self.tokenizer.eos_id is not None,
            False,
            False,
            document_mask,
        )
        how: dict[str, Any] = {
            "field": field,
            "split": split,
            "detokenizer": detokenizer,
            "bad_records": bad_records,
        }
        read = lambda d: prepare(_names(d), self.tokenizer, packing, **how)
        if fit_on is not None:
            options["counts"] = fit_counts(self.model, read(fit_on), block_size=block_size)
        rows = arranged(
            read(data),
            view,
            stride,
            self.spec.first_token,
            block_size or self.spec.block_size,
            document_tokens,
        )
        return self._scored("evaluate", rows, method=method, block_size=block_size, **options)

    def _scored(self, name: str, rows: Any, **options: Any) -> Score:
        if "tokenizer" in options:
            raise ConfigError(
                f"{name} has no option 'tokenizer'; it is the model's own: leave it out"
            )
        return evaluate_rows(self.model, rows, tokenizer=self.tokenizer, **options)

    # -- writing -----------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 256,
        decoder: Any = "first-hitting",
        seed: int = 0,
        **options: Any,
    ) -> Generated: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        max_new_tokens: int = 256,
        decoder: Any = "first-hitting",
        seed: int = 0,
        **options: Any,
    ) -> list[Generated]: ...

    @validated()
    def generate(
        self,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int = 256,
        decoder: Any = "first-hitting",
        seed: int = 0,
        *,
        window: int | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Generated | list[Generated]:
        """Go on from a prompt, or from several at once (row i then takes seed + i; its text does
        not depend on the others).

        decoder: a decoder's name ("first-hitting", "ancestral", ...), "package.module:Class", or an
        object. options: the other fields of `bdlm.generation.sampling_params.SamplingParams`
        (temperature, top_p, stop, block_size, ...) and the decoder's own parameters by name.
        window: most tokens to look back on; default the training length (a longer prompt whole,
        with a warning) once the text outgrows it, 0 for no limit.
        streamer: of transformers (`TextDiffusionStreamer`, `TextStreamer`), told of one text while
        it is written. Raises ConfigError, before any forward pass, for what does not fit."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        params = sampling_params(
            OF_GENERATE, max_new_tokens=max_new_tokens, decoder=decoder, seed=seed, **options
        )
        ids = [self._prompt_ids(p) for p in prompts]
        windows = self._windows(ids, params, window)
        if streamer is None:
            results = self._written(
                ids, [params.with_(seed=params.seed + i) for i in range(len(ids))], windows
            )
        else:
            if len(ids) != 1 or params.retries:
                raise ConfigError(
                    "streamer takes one text that is written once; give one prompt and no retries"
                )
            if not all(hasattr(streamer, name) for name in ("put", "end")):
                raise ConfigError(
                    f"streamer is {shown(streamer)}; use a streamer of transformers: an object with"
                    " put and end"
                )
            events = stream_ids(
                self._writer(),
                ids[0],
                params,
                context_window=windows[0],
                decode=self.tokenizer.decode,
            )
            results = [feed(streamer, ids[0], events, self.spec.mask_id)]
        made = [
            self._generated(*each, params)
            for each in zip(prompts, ids, results, windows, strict=True)
        ]
        return made[0] if isinstance(prompt, str) else made

    @validated()
    def generate_from_ids(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        window: int | None = None,
    ) -> list[Generated]:
        """Go on from token ids as they are, each prompt with its own params (and so its own seed),
        in shared forward passes.

        window: as in `generate`. Raises ConfigError, before any forward pass, for what does not
        fit."""
        if len(prompts) != len(params):
            raise ConfigError(
                f"{len(prompts)} prompts came with {len(params)} params; give one each"
            )
        ids = [list(prompt) for prompt in prompts]
        windows = [
            self._windows([own], each, window)[0] for own, each in zip(ids, params, strict=True)
        ]
        results = self._written(ids, params, windows)
        texts = [self.tokenizer.decode(own) for own in ids]
        return [
            self._generated(*each)
            for each in zip(texts, ids, results, windows, params, strict=True)
        ]

    @validated()
    def infill(
        self, before: str, after: str, new_tokens: int = 32, over: str = "gap", **options: Any
    ) -> Generated:
        """Write `new_tokens` tokens between two texts; the result's text ends with `after`.

        over: what the new tokens are conditioned on besides `before`: "gap" one block reaches over
        the gap and `after`; "text" one block is the whole text; "blocks" nothing, `after` is forced
        when it is reached (and the notes say so). Options as in `generate`."""
        if taken := sorted(
            {"prompt", "max_new_tokens", "known_tokens", "streamer"} & options.keys()
        ):
            raise ConfigError(f"{taken[0]} is what infill itself gives to generate; leave it out")
        if new_tokens < 1:
            raise ConfigError(f"new_tokens is {new_tokens}; use 1 or more")
        tail = self.tokenizer.encode(_utf8("after", after))
        given = {new_tokens + i: token for i, token in enumerate(tail)}
        return self.generate(
            before, new_tokens + len(tail), known_tokens=given, infill_mode=over, **options
        )

    def _writer(self) -> Any:
        """The model as generation wants it, kept until a weight changes."""
        return self.__dict__["_inference_form"].form()

    @validated()
    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = 256,
        decoder: Any = "first-hitting",
        seed: int = 0,
        drafts: bool = False,
        *,
        window: int | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """The same text as `generate`, as it is written. drafts: also every step of the block being
        written.

        The pieces of kind "text" join to the text; the last chunk is of kind "end". Options as in
        `generate`. With `min_entropy`, pieces come `entropy_window` tokens late: the text may end
        that far back."""
        params = sampling_params(
            OF_STREAM, max_new_tokens=max_new_tokens, decoder=decoder, seed=seed, **options
        )
        if params.retries:
            raise ConfigError(
                f"retries is {params.retries}, but a stream cannot take text back; use generate,"
                " or 0"
            )
        ids = self._prompt_ids(prompt)
        back = self._windows([ids], params, window)[0]
        events = stream_ids(
            self._writer(),
            ids,
            params,
            context_window=back,
            decode=self.tokenizer.decode,
            drafts=drafts,
        )
        return self._chunks(events, prompt, ids, params, back)

    def _chunks(
        self,
        events: Iterator[Event],
        prompt: str,
        ids: list[int],
        params: SamplingParams,
        window: int | None,
    ) -> Iterator[Chunk]:
        search, written = self._search(ids, params), ""
        for event in events:
            if event.kind == "draft":
                cells = list(zip(event.ids, event.masked, strict=True))[event.known :]
                yield Chunk(
                    "draft",
                    cells=tuple(
                        None if hidden else self.tokenizer.decode([i]) for i, hidden in cells
                    ),
                )
            elif event.kind == "commit":
                search.push(event.tokens)
                new = search.settled[len(written) :]
                written += new
                if new:
                    yield Chunk("text", text=new)
            elif event.result is not None:
                result = self._generated(prompt, ids, event.result, window, params)
                if len(result.text) > len(written):
                    yield Chunk("text", text=result.text[len(written) :])
                yield Chunk("end", result=result)

    def _search(self, ids: list[int], params: SamplingParams) -> TextSearch:
        """What turns the new ids of a request into its text."""
        return TextSearch(self.tokenizer.decode, ids, params.stop, params.min_new_tokens)

    def _prompt_ids(self, prompt: str) -> list[int]:
        """The prompt's ids, opened as texts were in training."""
        first, ids = self.spec.first_token, self.tokenizer.encode(_utf8("prompt", prompt))
        if first is None and not ids and self.spec.mask_id < 0:  # a causal model from elsewhere
            first = self.tokenizer.bos_id
        return ([] if first is None else [first]) + ids

    def _windows(
        self, prompts: list[list[int]], params: SamplingParams, window: int | None
    ) -> list[int | None]:
        """How far each text looks back: what was asked, else the training length for texts that
        outgrow it; None for no limit.

        A prompt that is longer than the training length is looked back on whole, with a warning.
        Each prompt is judged by itself: a text never depends on its neighbours."""
        lengths, trained = [len(p) for p in prompts], self.spec.max_length
        if window is not None:
            return [window or None] * len(prompts)
        slides = self.spec.streams == 2 or self.spec.noise == "none"
        longest = max(lengths, default=0)
        if not slides or "cache" not in self.spec.supports:
            return [None] * len(prompts)
        if longest > trained:
            said = (
                f"the prompt has {longest} tokens, more than the {trained} that the model was"
                " trained to look back on"
            )
            warnings.warn(
                f"{said}; all of it is used: expect worse text, or shorten it",
                BdlmWarning,
                stacklevel=4,
            )
        least = max(trained, 2 * (params.block_size or self.spec.block_size))
        return [None if n + params.max_new_tokens <= trained else max(least, n) for n in lengths]

    def _written(
        self, ids: list[list[int]], each: Sequence[SamplingParams], windows: list[int | None]
    ) -> list[RequestOutput]:
        """The texts in the order of their prompts, each with its own params; those of one window
        share their calls, and so do texts that fit with the narrowest."""
        narrowest = min((w for w in windows if w is not None), default=None)
        windows = [narrowest if w is None else w for w in windows]
        found: dict[int, RequestOutput] = {}
        for window in dict.fromkeys(windows):
            rows = [i for i, own in enumerate(windows) if own == window]
            asked = [ids[i] for i in rows], [each[i] for i in rows]
            found.update(
                zip(
                    rows,
                    write_ids(
                        self._writer(), *asked, context_window=window, decode=self.tokenizer.decode
                    ),
                    strict=True,
                )
            )
        return [found[i] for i in range(len(ids))]

    def _generated(
        self,
        prompt: str,
        ids: list[int],
        result: RequestOutput,
        window: int | None,
        params: SamplingParams,
    ) -> Generated:
        search = self._search(ids, params)
        search.push(result.token_ids)
        search.finish()
        return Generated(
            text=search.text,
            prompt=prompt,
            tokens=len(result.token_ids),
            forward_passes=result.forward_passes,
            tokens_per_forward=result.tokens_per_forward,
            seconds=result.seconds,
            finish_reason=result.finish_reason,
            ids=result.token_ids,
            log_probs=result.log_probs,
            notes=result.notes,
            window=window,
            engine_steps=result.engine_steps,
            retries=result.retries,
        )


def _names(data: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(d) for d in ([data] if isinstance(data, str | Path) else data)]


def _utf8(name: str, value: str) -> str:
    """The value itself if it can be stored as UTF-8. Raises ConfigError."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} holds {value[error.start]!r} at place {error.start}, which is no UTF-8 text;"
            " leave it out"
        ) from None
    return value


@validated()
def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_code: bool = False,
    compile: bool = False,
    verify: bool = True,
) -> LM:
    """A model and its tokenizer, from a folder, or by the name of one that comes with the package
    ("shakespeare").

    device: "cpu", "cuda", or "auto" for the better there is. dtype: "float32", "bfloat16", ...;
    default that of the stored weights.
    trust_code: let a config that names Python code run it. compile: write with layers by
    torch.compile, for GPUs (on CPU it is slower, and each new number of cells in a call costs
    seconds the first time); native models without time conditioning only.
    verify: compare the files with the checksums in the folder's manifest.json first (one to four
    seconds a GB); a note tells where there are none. Raises CheckpointError, DataError, ConfigError
    in one line each."""
    if not str(name_or_path):
        raise ConfigError("name_or_path is ''; give a model folder, or the name of a model")
    path = model_folder.resolve(name_or_path)
    model, report = model_folder.load(
        path, device_of_name(device), dtype_of_name(dtype), trust_code, verify=verify
    )
    tokenizer = _tokenizer_of(path, model)
    return LM(
        model,
        tokenizer,
        path,
        (*report.notes, *([f"learned noise interval {report.clip}"] if report.clip else [])),
        compile,
    )


def _tokenizer_of(path: Path, model: Any) -> Tokenizer:
    """The tokenizer of a model folder, as its model needs it."""
    foreign = isinstance(model, HFDenoiser)
    without_mask = foreign and model.spec.mask_id < 0
    tokenizer = load_tokenizer(_tokenizer_folder(path), masked=not without_mask)
    size, mask = model.spec.vocab_size, model.spec.mask_id
    check_fits(tokenizer, size, tokenizer.mask_id if without_mask else mask, padded=foreign)
    if foreign:
        unused = frozenset(range(tokenizer.vocab_size, size))
        first = getattr(tokenizer, "opening", None) if without_mask else None
        model.fit_tokenizer(first, unused | getattr(tokenizer, "unused_ids", frozenset()))
    return tokenizer


def _tokenizer_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    if not any(
        (folder / name).is_file()
        for name in ("bdlm_tokenizer.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")
    ):
        raise CheckpointError(
            f"{folder}: holds no tokenizer (bdlm_tokenizer.json or tokenizer.json); copy the one"
            " that the model was trained with"
        )
    return folder


@validated()
def train(config: TrainConfig) -> TrainResult:
    """Train as the config says, logging a sample text at each validation.
    `bdlm.training.config.load_config` reads recipes."""
    survive_fork()
    return train_loop(config, _sample)


def _sample(model: Any, tokenizer: Any, block_size: int) -> str:
    """A short text of a model in training; one without a first token cannot start from nothing and
    goes on from a line end."""
    start = "" if model.spec.first_token is not None else "\n"
    size = (
        {"block_size": block_size} if model.spec.streams == 2 and model.spec.noise != "none" else {}
    )
    return (
        LM(model, tokenizer)
        .generate(start, max_new_tokens=min(64, model.spec.max_length - 1), **size)
        .text
    )
