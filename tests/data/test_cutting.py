"""Texts encoded by pieces have exactly the ids of the whole, for every kind of tokenizer; unknown
ones are encoded whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from bdlm.core.errors import DataError
from bdlm.data import cutting, shards
from bdlm.data.cutting import COMPOSED, GPT2, GPT4, PATTERNS, PLAIN, WORDS, cuts_of
from bdlm.data.shards import Tokenised, in_memory
from bdlm.data.tokenizers import TOKENIZERS, HFTokenizer, train_bpe

ODD = [
    "é",
    "İ",
    "ß",
    "да",
    "日本",
    "か",
    "が",
    "한",
    "ü",
    "\u0301",
    "\u00a0",
    "\u3000",
    "'s",
    "n't",
    "\U0001f469",
]
ALPHABET = [*"aabBcxyZ 12,.!'\"-\n\n\t\r  ", *ODD]
ENDED = [
    "b ",
    "x\n",
    "日 ",
    "本\n",
    "да ",
    "é\n",
    "가 ",
    "İ ",
    "ab ",
]  # a letter and a blank: where a cut may be
texts = st.lists(st.sampled_from(ALPHABET + ENDED), max_size=60).map("".join)
long_texts = st.lists(st.sampled_from(ALPHABET + ENDED), min_size=30, max_size=60).map("".join)
TRAINING = [
    "".join(ALPHABET) * 3,
    "a bb ab ba. Zx, 'tis 12 日本 да\n\nb",
    "don't B's x\ny ab\nab, ab!",
] * 5

Make = Callable[[], Engine]


def engine(
    pre: Any, normalizer: Any = None, model: Any = None, added: tuple[Any, ...] = ()
) -> Engine:
    """A trained engine with these parts."""
    made = Engine(model or models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    kinds = {
        "BPE": trainers.BpeTrainer,
        "WordPiece": trainers.WordPieceTrainer,
        "WordLevel": trainers.WordLevelTrainer,
        "Unigram": trainers.UnigramTrainer,
    }
    options: dict[str, Any] = (
        {"unk_token": "[UNK]"} if isinstance(made.model, models.Unigram) else {}
    )
    trainer = kinds[type(made.model).__name__](
        vocab_size=400, special_tokens=["[UNK]"], show_progress=False, **options
    )
    made.train_from_iterator(TRAINING, trainer)
    made.add_tokens(list(added))
    return made


def byte_level(pattern: str | None = None) -> Any:
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


NF = normalizers
CUTTABLE: dict[str, Make] = {
    **{f"pattern {i}": lambda p=p: engine(byte_level(p)) for i, p in enumerate(PATTERNS)},
    "gpt2": lambda: engine(byte_level()),
    "nfc": lambda: engine(byte_level(GPT4), NF.NFC()),
    "nfd": lambda: engine(byte_level(GPT4), NF.NFD()),
    "nfkc and lower case": lambda: engine(
        byte_level(WORDS), NF.Sequence([NF.NFKC(), NF.Lowercase()])
    ),
    "bert": lambda: engine(
        pre_tokenizers.BertPreTokenizer(), NF.BertNormalizer(), models.WordPiece(unk_token="[UNK]")
    ),
    "bert by bytes": lambda: engine(byte_level(WORDS), NF.BertNormalizer()),
    "words": lambda: engine(pre_tokenizers.Whitespace(), model=models.WordLevel(unk_token="[UNK]")),
    "unigram": lambda: engine(pre_tokenizers.WhitespaceSplit(), model=models.Unigram()),
    "digits and punctuation": lambda: engine(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.Punctuation(), byte_level()]
        )
    ),
    "added tokens": lambda: engine(
        byte_level(GPT2),
        added=(
            "ab",
            "  ",
            AddedToken("Z", lstrip=True),
            AddedToken("a", single_word=True),
            AddedToken("日本", normalized=False),
        ),
    ),
}
WHOLE: dict[str, Make] = {
    "a pattern of its own": lambda: engine(byte_level(r"\w+ \w+|.|\s")),
    "no words": lambda: engine(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "a space before": lambda: engine(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace": lambda: engine(pre_tokenizers.Metaspace(split=False)),
    "merged": lambda: engine(pre_tokenizers.Split(Regex(GPT2), behavior="merged_with_next")),
    "stripped": lambda: engine(byte_level(), NF.Strip()),
    "replaced": lambda: engine(byte_level(), NF.Sequence([NF.NFC(), NF.Replace(" ", "_")])),
    "an added token over a blank": lambda: engine(byte_level(), added=("b x",)),
    "an added token that takes the blank after it": lambda: engine(
        byte_level(), added=(AddedToken("b", rstrip=True),)
    ),
    "dropout": lambda: engine(byte_level(), model=models.BPE(dropout=0.5, unk_token="[UNK]")),
}
BUILT: dict[str, tuple[Engine, Any]] = {}


def built(name: str) -> tuple[Engine, Any]:
    """The engine and its cuts, made once."""
    if name not in BUILT:
        made = {**CUTTABLE, **WHOLE}[name]()
        BUILT[name] = (made, cuts_of(made.to_str()))
    return BUILT[name]


@pytest.mark.parametrize("name", CUTTABLE)
def test_known_kinds_are_cut_and_their_ids_are_those_of_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PIECE", 3)
    made, cuts = built(name)
    seen = 0

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(long_texts)
    def check(text: str) -> None:
        nonlocal seen
        parts = list(cutting.pieces(text, cuts))
        seen += len(parts) > 2
        assert "".join(parts) == text
        joined = [i for part in parts for i in made.encode(part, add_special_tokens=False).ids]
        assert joined == made.encode(text, add_special_tokens=False).ids

    check()
    assert seen > 50, "texts are cut at all"


@pytest.mark.parametrize("name", WHOLE)
def test_where_no_safe_place_is_known_the_text_stays_whole(name: str) -> None:
    assert built(name)[1] is None
    assert list(cutting.pieces("ab ab " * 90_000, None)) == ["ab ab " * 90_000]


def test_truncation_is_a_matter_of_the_whole() -> None:
    made = engine(byte_level())
    made.enable_truncation(8)
    assert cuts_of(made.to_str()) is None


def test_every_letter_of_the_rules_is_a_letter_to_the_tokenizers() -> None:
    letters = re.compile(f"[{PLAIN}{COMPOSED}]").findall("".join(map(chr, range(0xD800))))
    assert len(letters) > 30_000
    inside = re.compile(f"[{PLAIN}{COMPOSED}][ \n]")
    for pattern in PATTERNS:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for blank in " \n":
            text = blank.join(letters)
            parts = [part for part, _ in split.pre_tokenize_str(text)]
            assert "".join(parts) == text
            assert not [part for part in parts if inside.search(part)], (
                "a piece ends after each letter that a blank follows"
            )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kind of the library's tokenizers."""
    bpe = train_bpe(TRAINING, 330)
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.json").write_text(bpe.fingerprint(), encoding="utf-8")
    metaspace = tmp_path_factory.mktemp("whole")
    made = built("metaspace")[0]
    made.decoder = decoders.Metaspace()
    (metaspace / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    named = {name: make() for name, make in TOKENIZERS.items()}
    return {**named, "bpe": bpe, "hf": HFTokenizer(folder), "hf whole": HFTokenizer(metaspace)}


@pytest.mark.parametrize("name", [*TOKENIZERS, "bpe", "hf", "hf whole"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(several=st.lists(texts, min_size=1, max_size=3))
def test_every_tokenizer_gives_the_same_run_of_ids(
    tokenizers: dict[str, Any], name: str, several: list[str]
) -> None:
    tokenizer = tokenizers[name]
    reference = [[7, *tokenizer.encode(text), 8] for text in several]
    with pytest.MonkeyPatch.context() as patch:
        for module in (cutting, shards):
            patch.setattr(module, "PIECE", 3)
        patch.setattr("bdlm.data.tokenizers.PIECE", 3)
        patch.setattr("bdlm.data.hf_tokenizer.PIECE", 3)
        assert tokenizer.encode_batch(several) == [ids[1:-1] for ids in reference]
        documents = Tokenised(several, tokenizer, [7], [8])
        stream = in_memory(documents, "key")
    assert stream.read(0, stream.tokens).tolist() == [i for ids in reference for i in ids]
    assert documents.lengths == [len(ids) for ids in reference]
    assert stream.starts.tolist() == np.cumsum([0, *documents.lengths])[:-1].tolist()
    assert stream.bytes == sum(len(text.encode()) for text in several)


def test_a_long_document_is_encoded_in_small_pieces(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, largest = "some words of a long text, one after the other\n" * 20_000, 0
    for name in ("bytes", "bpe", "hf"):
        tokenizer, inner = tokenizers[name], "encode_batch" if name == "bytes" else "_encode"
        whole = tokenizer.encode(text)
        original = getattr(tokenizer, inner)

        def watched(parts: list[str], original: Any = original) -> list[list[int]]:
            nonlocal largest
            largest = max(largest, sum(map(len, parts)))
            return original(parts)

        monkeypatch.setattr(tokenizer, inner, watched)
        stream = in_memory(Tokenised([text], tokenizer, [], []), "key")
        assert stream.read(0, stream.tokens).tolist() == whole
        assert 0 < largest <= cutting.PIECE * (cutting.TOGETHER + 2)


def test_training_on_long_texts_gives_the_same_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_bpe(["".join(TRAINING)], 330)
    monkeypatch.setattr(cutting, "PIECE", 5)
    assert train_bpe(["".join(TRAINING)], 330).fingerprint() == whole.fingerprint()


def test_a_lone_surrogate_names_its_document() -> None:
    with pytest.raises(DataError, match="document 1 cannot be written as UTF-8"):
        list(Tokenised(["fine", "\ud800"], TOKENIZERS["bytes"](), [], []))


def test_definitions_of_old_and_odd_forms_are_left_whole() -> None:
    bare = json.loads(built("gpt2")[0].to_str())
    for change in (
        {"normalizer": {"type": "Unheard"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
    ):
        assert cuts_of(json.dumps({**bare, **change})) is None
