"""The Python interface: load a model, generate with it, score with it; and train one from a config.

In: names, paths, text. Out: text, numbers, a run folder. An `LM` joins a model with its tokenizer:
prompts become ids for the engine, texts become windows for the likelihood. No algorithm lives here.

    lm = bdlm.load("shakespeare")
    print(lm.generate("MACBETH:\\n", max_new_tokens=200, decoder="eb", top_p=0.9).text)
    print(lm.score("Tomorrow, and tomorrow, and tomorrow"))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import torch
from torch import Tensor

from bdlm.core.counts import CountDistribution
from bdlm.core.devices import device_of_name, dtype_of_name
from bdlm.core.errors import CheckpointError, ConfigError, shown
from bdlm.core.estimators import LARGEST
from bdlm.core.threads import survive_fork
from bdlm.core.types import Denoiser, ModelSpec
from bdlm.core.validation import Between, Count, Size, validated
from bdlm.data.packing import Packing, Windows, prepare
from bdlm.data.tokenizers import Tokenizer, check_fits, load_tokenizer
from bdlm.generation.call_arguments import params_of_call, params_or_options
from bdlm.generation.decoders import Decoder
from bdlm.generation.full_sequence.approximate_cache import ApproximateCache
from bdlm.generation.sampling_params import RequestOutput as RequestOutput
from bdlm.generation.sampling_params import SamplingParams
from bdlm.generation.text_generation import Chunk as Chunk
from bdlm.generation.text_generation import Streamer, TextGenerator, utf8
from bdlm.likelihood.bound import Progress, fit_counts
from bdlm.likelihood.bound import evaluate as evaluate_rows
from bdlm.likelihood.rows import Rows, arranged, sliding, stride_of, whole_documents
from bdlm.likelihood.score import Score as Score
from bdlm.models import model_folder
from bdlm.models.hf import HFDenoiser
from bdlm.models.inference_form import InferenceFormCache
from bdlm.training.config import TrainConfig
from bdlm.training.loop import TrainResult as TrainResult
from bdlm.training.loop import train as train_loop

InfillMode = Literal["blocks", "gap", "text"]
ContextWindow = Annotated[int, Between(0, 2**24, said="use 1 to 2^24, or 0 for no limit")]


@dataclass(frozen=True)
class LM:
    """A model with its tokenizer. Made by `load`, or by hand from any `Denoiser` and any tokenizer.

    path: where it was loaded from. notes: what the load report says. compile: generate with
    torch.compile (`load`). Any number of threads may use one at once. Results follow the weights,
    which may change between calls."""

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
        """The conventions of the model: vocabulary, block size, training length, kind of noise."""
        return self.model.spec

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(iter(self.model.parameters())).dtype

    @property
    def _generator(self) -> TextGenerator:
        return TextGenerator(self.model, self.tokenizer, self.__dict__["_fresh"].form)

    # -- generation --------------------------------------------------------------------------------

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
        ids = [self._generator.prompt_ids(p) for p in prompts]
        if cache is None:
            if cache_options:
                raise ConfigError("cache_options came without a cache; name it: cache='dual'")
            made = self._generator.generate(prompts, ids, params, context_window, streamer)
        else:
            if streamer is not None or context_window is not None:
                name = "context_window" if streamer is None else "streamer"
                raise ConfigError(f"{name} does not work with cache; leave one of them out")
            options = dict(cache_options or {})
            made = self._generator.generate_cached(prompts, ids, params, cache, options)
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
        generator = self._generator
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
        generator, tail = self._generator, self.tokenizer.encode(utf8("after", after))
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
        return self._generator.generate(texts, ids, params, context_window)

    # -- likelihood --------------------------------------------------------------------------------

    @validated()
    def score(
        self,
        text: str | Sequence[str],
        method: str = "nelbo",
        block_size: Count | None = None,
        *,
        estimator: str = "count",
        schedule: str = "linear",
        replicates: Count = 4,
        orders: Count = 16,
        counts: CountDistribution | None = None,
        batch_size: Count = 16,
        seed: int = 0,
        target_stderr: float | None = None,
        max_replicates: Count = 256,
        max_tokens: Count | None = None,
        largest: int = LARGEST,
        unit: str = "auto",
        positions: Count | None = None,
        keys: Tensor | None = None,
        progress: bool | Progress = False,
    ) -> Score:
        """Measure the likelihood of a text, or of several taken together: each from its start, with
        all that came before in view.

        method: "nelbo" (Monte-Carlo bound), "nelbo-exact", "exact" or "k-orders". At block size 1
        and for autoregressive models the result is exact, whatever the method. The other options
        are explained in `bdlm.likelihood.bound.evaluate`. Texts longer than the training length go
        through a window that moves by half of it."""
        texts = [text] if isinstance(text, str) else text
        documents = [self.tokenizer.encode(utf8("text", t)) for t in texts]
        first, length = self.spec.first_token, self.spec.max_length
        if max(map(len, documents), default=0) + (first is not None) <= length:
            rows = whole_documents(documents, first)
        else:
            stride = stride_of(length, block_size or self.spec.block_size)
            rows = sliding(documents, length, stride, first)
        return self._score(rows, locals())

    @validated()
    def evaluate(
        self,
        data: str | Path | Sequence[str | Path],
        method: str = "nelbo",
        block_size: Count | None = None,
        *,
        length: Size | None = None,
        field: str = "text",
        split: str = "file",
        detokenizer: str = "none",
        bad_records: float = 0.01,
        document_mask: bool = False,
        view: str = "packed",
        stride: int | None = None,
        document_tokens: int | None = None,
        fit_on: str | Path | Sequence[str | Path] | None = None,
        estimator: str = "count",
        schedule: str = "linear",
        replicates: Count = 4,
        orders: Count = 16,
        counts: CountDistribution | None = None,
        batch_size: Count = 16,
        seed: int = 0,
        target_stderr: float | None = None,
        max_replicates: Count = 256,
        max_tokens: Count | None = None,
        largest: int = LARGEST,
        unit: str = "auto",
        positions: Count | None = None,
        keys: Tensor | None = None,
        progress: bool | Progress = False,
    ) -> Score:
        """Measure the likelihood of files, folders or named datasets, packed into windows as in
        training (the first token of each window is given).

        length: of a window, default the training length. field, split, detokenizer, bad_records:
        how data becomes documents, see `bdlm.data.packing.prepare`. view: "packed" windows, a
        "sliding" window that moves by `stride`, or whole "documents", see
        `bdlm.likelihood.rows.arranged`. document_tokens: for the last two, keep so many tokens from
        the start of each document, an opening token included. fit_on: other data, for estimator
        "importance". The other options: as in `score`."""
        packing = Packing(
            self.spec.max_length if length is None else length,
            self.tokenizer.eos_id is not None,
            False,
            False,
            document_mask,
        )

        def read(names: str | Path | Sequence[str | Path]) -> Any:
            names = [names] if isinstance(names, str | Path) else names
            return prepare(
                [str(name) for name in names],
                self.tokenizer,
                packing,
                field=field,
                split=split,
                detokenizer=detokenizer,
                bad_records=bad_records,
            )

        if fit_on is not None:
            counts = fit_counts(self.model, read(fit_on), block_size=block_size)
        size, first = block_size or self.spec.block_size, self.spec.first_token
        rows = arranged(read(data), view, stride, first, size, document_tokens)
        return self._score(rows, locals())

    def _score(self, rows: Rows | Windows, arguments: Mapping[str, Any]) -> Score:
        """The score of some windows. arguments: of the calling method, by name."""
        known = inspect.signature(evaluate_rows).parameters
        options = {name: arguments[name] for name in known if name in arguments}
        return evaluate_rows(self.model, rows, tokenizer=self.tokenizer, **options)


@validated()
def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_code: bool = False,
    compile: bool = False,
    verify: bool = True,
) -> LM:
    """Load a model and its tokenizer from a folder, or by the name of a model that comes with the
    package ("shakespeare").

    device: "cpu", "cuda", or "auto" for the fastest there is. dtype: "float32", "bfloat16", ...;
    default that of the stored weights. trust_code: run Python code that the config names. compile:
    generate with layers compiled by torch.compile, for GPUs (on a CPU it is slower, and each new
    number of positions in a forward pass costs seconds the first time); native models without time
    conditioning only. verify: compare the files with the checksums in the folder's manifest.json
    first (one to four seconds a GB); a note says where there are none.

    Raises CheckpointError, DataError or ConfigError in one line."""
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
    """Train as the config says, and log a sample text at each validation. `bdlm.load_config` reads
    recipes and overrides."""
    survive_fork()
    return train_loop(config, _sample)


def _sample(model: Any, tokenizer: Any, block_size: int) -> str:
    """A short text of a model in training. A model without a first token cannot start from nothing
    and continues a line end."""
    start = "" if model.spec.first_token is not None else "\n"
    any_size = model.spec.streams == 2 and model.spec.noise != "none"
    made = LM(model, tokenizer).generate(
        start,
        max_new_tokens=min(64, model.spec.max_length - 1),
        block_size=block_size if any_size else None,
    )
    return made.text
