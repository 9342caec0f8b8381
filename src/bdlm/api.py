"""The Python interface: load a model, generate with it, score with it; and train one from a config.

In: names, paths, text. Out: text, numbers, a run folder. An `LM` joins a model with its tokenizer:
prompts become ids for the engine, texts become windows for the likelihood. No algorithm lives here.

    lm = bdlm.load("shakespeare")
    print(lm.generate("MACBETH:\\n", max_new_tokens=200, decoder="eb", temperature=0.7).text)
    print(lm.score("Tomorrow, and tomorrow, and tomorrow"))
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.core.counts import CountDistribution
from bdlm.core.devices import device_of_name, dtype_of_name
from bdlm.core.errors import CheckpointError, ConfigError, shown
from bdlm.core.estimators import LARGEST
from bdlm.core.threads import survive_fork
from bdlm.core.types import Denoiser, ModelSpec
from bdlm.core.validation import Count, Size, validated
from bdlm.data.packing import Packing, Windows, prepare
from bdlm.data.tokenizers import Tokenizer, check_fits, load_tokenizer
from bdlm.generation.lm_methods import GenerationMethods
from bdlm.generation.sampling_params import RequestOutput as RequestOutput
from bdlm.generation.text_generation import Chunk as Chunk
from bdlm.generation.text_generation import TextGenerator, utf8
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


@dataclass(frozen=True)
class LM(GenerationMethods):
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
    def _text_generator(self) -> TextGenerator:
        return TextGenerator(self.model, self.tokenizer, self.__dict__["_inference_form"].form)

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
