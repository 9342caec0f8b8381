"""Whatever a model folder's config.json says, a load ends with a model or with one line of ours."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import bdlm
from bdlm.core.errors import BdlmError, CheckpointError
from bdlm.data.tokenizers import ByteTokenizer
from bdlm.models.model_folder import save
from tests.models.causal_folders import causal_folder
from tests.models.test_model_folder import tiny

KINDS = ("native", "gpt2", "llama", "qwen2", "qwen3")
FEW, MANY = 30, 1000  # trials of each kind of folder

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([10**6, 10**9, 2**31, 2**63, 10**18, 10**30, -(10**9)]),
    st.floats(allow_nan=True, allow_infinity=True),
)
words = st.sampled_from(["", "x", "dynamic", "yarn", "sedd", "ar", "mdlm", "gpt2", "this", "a:b"])
plain = st.one_of(st.none(), st.booleans(), numbers, words, st.text(max_size=3))
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["rope_type", "rope_theta", "factor", "type", "a"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


def made(kind: str, folder: Path) -> Path:
    """A small folder of a kind, without checksums."""
    if kind != "native":
        return causal_folder(folder, kind)
    save(tiny(vocab_size=258, mask_id=257), folder)
    ByteTokenizer().save(folder)
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    return {kind: made(kind, root / kind) for kind in KINDS}


def check(folder: Path, changes: dict[str, Any]) -> None:
    """Load with some fields changed; a model that loads also writes, or says in a line why not."""
    file = folder / "config.json"
    original = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(original), **changes}))
        try:
            bdlm.load(folder)
        except BdlmError as error:
            assert "\n" not in str(error)
    finally:
        file.write_text(original)


@st.composite
def mutations(draw: st.DrawFn, fields: list[str]) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True))
    return {name: draw(values) for name in names}


EXTRA = (
    "bdlm",
    "backbone",
    "auto_map",
    "algo",
    "num_labels",
    "quantization_config",
    "rope_scaling",
    "sliding_window",
    "layer_types",
    "mask_token_id",
    "sampling_eps_min",
    "torch_dtype",
)


def run(kind: str, folder: Path, trials: int) -> None:
    fields = sorted({*json.loads((folder / "config.json").read_text()), *EXTRA})

    @settings(
        max_examples=trials,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(fields))
    def trial(changes: dict[str, Any]) -> None:
        check(folder, changes)

    trial()


@pytest.mark.parametrize("kind", KINDS)
def test_no_config_makes_a_load_raise_anything_but_our_errors(
    kind: str, folders: dict[str, Path]
) -> None:
    run(kind, folders[kind], FEW)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_configs(kind: str, folders: dict[str, Path]) -> None:
    run(kind, folders[kind], MANY)


# -- known hard ones -------------------------------------------------------------------------------

DEEP = '{"model_type": ' + "[" * 5000 + "]" * 5000 + "}"
LONG = '{"model_type": "llama", "vocab_size": ' + "9" * 6000 + "}"


@pytest.mark.parametrize("text", [DEEP, LONG, "[]", "nul", "", '{"a": 1'])
@pytest.mark.parametrize("kind", ["native", "llama"])
def test_json_that_is_no_config_is_refused_in_a_line(
    kind: str, text: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        bdlm.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("native", {"n_blocks": 10**6}, "n_blocks 1000000, the weights have 2"),
        ("native", {"hidden_dim": 2**40}, r"has shape|too large|overflow"),
        ("native", {"context": "sideways"}, "use 'block' or 'causal'"),
        ("native", {"dropout": "much"}, "dropout 'much'"),
        ("native", {"stop_token": 999}, "stop_token 999, outside"),
        ("llama", {"num_attention_heads": 0}, "cannot load it"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "cannot load it",
        ),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, but the file has"),
        ("llama", {"hidden_size": 2**15, "intermediate_size": 2**15}, "is mismatched"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ("gpt2", {"n_layer": 10**9}, "n_layer 1000000000, but the file has"),
        ("gpt2", {"n_positions": 10**7}, "is mismatched"),
        ("qwen2", {"bdlm": {"block_size": "four"}}, "block_size is 'four'"),
        ("qwen2", {"bdlm": {"colour": 1}}, "not colour"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_values_that_fit_nothing_are_refused_without_memory(
    kind: str, changes: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    bdlm.load(folders[kind])  # all modules are in memory now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=words) as caught:
        bdlm.load(folder)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


@pytest.mark.parametrize("kind", ["native", "llama"])
def test_weights_of_eight_bits_are_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "m")
    file = folder / "model.safetensors"
    small = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(file).items()}
    save_file(small, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"is (float8_e4m3fn|F8_E4M3); weights must be float32"
    ):
        bdlm.load(folder)


def test_a_long_training_length_takes_no_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tables of positions are as long as the text that is written."""
    folder = shutil.copytree(folders["native"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    long = {"model_length": 10**9, "block_size": 10**9}
    (folder / "config.json").write_text(json.dumps({**config, **long}))
    original = bdlm.load(folders["native"])
    want = original.generate("abc", max_new_tokens=1, seed=3).token_ids
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = bdlm.load(folder).generate("abc", max_new_tokens=1, seed=3)
    assert made.token_ids == want
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"
