"""Tokenizers: exact round trips, byte counts, special tokens that text cannot spell, folders that
say what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm.core.errors import ConfigError, DataError
from bdlm.data.tokenizers import (
    DESCRIPTION,
    END,
    MASK,
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    check_fits,
    load_tokenizer,
    train_bpe,
)

TRAINING = [
    "The quick brown fox jumps over the lazy dog.\n\nFOX:\nI jump, therefore I am.\n",
    "don't stop -- it's 1234!",
] * 20


def word_level(folder: Path) -> Path:
    """A Hugging Face tokenizer of whole words, without a mask or end token."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    engine = Engine(
        models.WordLevel({"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="[UNK]")
    )
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=engine, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe(TRAINING, 300)


@pytest.fixture(scope="module")
def hf_bytes(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    """The same merges as a bare tokenizer.json, through transformers."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.json").write_text(bpe.fingerprint(), encoding="utf-8")
    return HFTokenizer(folder)


@pytest.fixture(params=[*TOKENIZERS, "bpe", "hf"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param in TOKENIZERS:
        return TOKENIZERS[request.param]()
    return request.getfixturevalue({"bpe": "bpe", "hf": "hf_bytes"}[request.param])


AWKWARD = [
    "",
    " ",
    "\n\n \n",
    "a\r\nb\t ",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 emoji",
    "\x00\x01\ufeff",
    f"say {END} and {MASK}",
    "'S 'tis don't",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_comes_back_exactly_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.byte_lengths(ids)) == len(text.encode())
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back_exactly(bpe: BPETokenizer, text: str) -> None:
    for one in (bpe, ByteTokenizer()):
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert sum(one.byte_lengths(ids)) == len(text.encode())


def test_special_tokens_are_ids_of_their_own(tokenizer: Tokenizer) -> None:
    special = {tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id} - {None}
    assert all(0 <= i < tokenizer.vocab_size for i in special)
    assert tokenizer.mask_id != tokenizer.eos_id
    assert tokenizer.decode(sorted(special)) == ""
    assert tokenizer.byte_lengths(sorted(special)) == [0] * len(special)
    assert not special & set(tokenizer.encode(f"a{END}b{MASK}c<|startoftext|>"))


def test_added_tokens_count_the_bytes_that_they_are_spelt_with(
    bpe: BPETokenizer, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_str(bpe.fingerprint())
    engine.add_tokens(["日本", "naïve", "\n\n"])
    (tmp_path / "tokenizer.json").write_text(engine.to_str(), encoding="utf-8")
    text = "in 日本 a naïve\n\nend é"
    for tokenizer in (BPETokenizer(engine.to_str()), HFTokenizer(tmp_path)):
        ids = tokenizer.encode(text)
        assert tokenizer.byte_lengths(tokenizer.encode("日本")) == [6]
        assert sum(tokenizer.byte_lengths(ids)) == len(text.encode())
        special = [
            i for i in (tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id) if i is not None
        ]
        assert tokenizer.byte_lengths(special) == [0] * len(special)


def test_added_tokens_of_other_kinds_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    engine = AutoTokenizer.from_pretrained(word_level(tmp_path / "words"))
    engine.add_tokens(["##日本", "<0x41>"])
    engine.save_pretrained(tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    assert tokenizer.byte_lengths(tokenizer.encode("to <0x41> ##日本")) == [2, 6, 8]


def test_sizes() -> None:
    assert (ByteTokenizer().vocab_size, ByteTokenizer(end=False).vocab_size) == (258, 257)
    assert ByteTokenizer(end=False).eos_id is None
    assert isinstance(ByteTokenizer(), Tokenizer)


def test_bpe_has_the_size_asked_for_and_shortens_text(bpe: BPETokenizer) -> None:
    assert (bpe.vocab_size, bpe.eos_id, bpe.mask_id) == (300, 298, 299)
    assert len(bpe.encode(TRAINING[0])) < len(TRAINING[0]) * 0.7
    assert train_bpe(["ab"], 300).vocab_size < 300  # too little text for more merges


def test_bpe_training_is_deterministic(bpe: BPETokenizer) -> None:
    assert train_bpe(TRAINING, 300).fingerprint() == bpe.fingerprint()


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 257 .* at least 258"):
        train_bpe(["text"], 257)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.encode(TRAINING[0]) == tokenizer.encode(TRAINING[0])
    for name in ("vocab_size", "mask_id", "eos_id", "bos_id"):
        assert (
            getattr(again, name)
            == getattr(tokenizer, name)
            == json.loads((tmp_path / DESCRIPTION).read_text())[name]
        )
    assert again.fingerprint() == tokenizer.fingerprint()
    tokenizer.save(tmp_path)  # the same again is no conflict


def test_another_tokenizer_is_not_overwritten_unasked(bpe: BPETokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    other = train_bpe(["completely other words " * 5], 270)
    with pytest.raises(
        DataError, match=r"tokenizer.json exists with other content; .* overwrite=True"
    ):
        other.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == bpe.fingerprint()
    other.save(tmp_path, overwrite=True)
    assert load_tokenizer(tmp_path).fingerprint() == other.fingerprint()


def test_a_hugging_face_tokenizer_gets_the_mask_and_end_that_it_lacks(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(word_level(tmp_path / "words"))
    assert tokenizer.vocab_size == 7
    assert {tokenizer.mask_id, tokenizer.eos_id} == {5, 6}
    assert tokenizer.encode("to be or what") == [1, 2, 3, 0]
    assert "[UNK]" in tokenizer.decode([1, 0])  # unknown words stay visible
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("not to be") == [4, 1, 2]


def test_a_berts_opening_and_separator_are_its_own(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "we"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    tokenizer = load_tokenizer(tmp_path / "bert")
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id) == (
        8,
        4,
        2,
        3,
    )
    assert tokenizer.encode("we playing") == [7, 5, 6]
    assert tokenizer.byte_lengths([2, 7, 5, 6]) == [0, 2, 4, 3]


@pytest.mark.parametrize("name", ["no/such/folder", "byts"])
def test_an_unknown_name_says_what_is_possible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=f"tokenizer '{name}' cannot be loaded .*bytes") as error:
        load_tokenizer(name)
    assert "\n" not in str(error.value)


def test_damaged_folders_are_refused_by_name(bpe: BPETokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**description, "mask_id": 7}))
    with pytest.raises(DataError, match=f"{DESCRIPTION} says mask_id 7 but"):
        load_tokenizer(tmp_path)
    (tmp_path / DESCRIPTION).write_text("[" * 100_000)
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description)[:-9])
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps({**description, "kind": "bpee"}))
    with pytest.raises(ConfigError, match="did you mean 'bpe'"):
        load_tokenizer(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models

    with pytest.raises(DataError, match=r"no <\|end\|> or <\|mask\|> token"):
        BPETokenizer(Engine(models.BPE()).to_str())


def test_a_model_with_another_vocabulary_is_refused() -> None:
    check_fits(ByteTokenizer(), 258, 257)
    with pytest.raises(
        DataError, match="the tokenizer has 258 ids but the model has vocab_size 50258"
    ):
        check_fits(ByteTokenizer(), 50258, 50257)
    with pytest.raises(DataError, match="mask_id 257 but the model 0"):
        check_fits(ByteTokenizer(), 258, 0)
