"""Ids: the same as tiktoken's and Hugging Face's from the same merges; and the file that keeps them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from awkward_texts import anything, awkward, repeats, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from nanochat_bpe import Encoder

from nanochat_core.tokenizer.bpe import Tokenizer, load_tokenizer, train
from nanochat_core.tokenizer.samples import SAMPLES
from nanochat_core.tokenizer.special import SPECIAL_TOKENS

TOKENIZER = train([*SAMPLES.values()] * 2, 1200)
TIKTOKEN = TOKENIZER.to_tiktoken()
one_text = st.one_of(awkward, anything, repeats)


@given(one_text)
def test_ids_equal_tiktokens_and_decode_to_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == TIKTOKEN.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text


@settings(deadline=None, max_examples=60)
@given(texts, st.lists(one_text, max_size=10))
def test_ids_equal_tiktokens_whatever_the_merges(corpus: list[str], documents: list[str]) -> None:
    if any(corpus):
        tokenizer = train(corpus, 600)
        peer = tokenizer.to_tiktoken()
        expected = [peer.encode_ordinary(text) for text in corpus + documents]
        assert tokenizer.encode_batch(corpus + documents, 2) == expected
        assert [tokenizer.encode(text) for text in corpus + documents] == expected


@pytest.mark.parametrize("kind", SAMPLES)
def test_ids_equal_tiktokens_on_every_sample(kind: str) -> None:
    assert TOKENIZER.encode(SAMPLES[kind]) == TIKTOKEN.encode_ordinary(SAMPLES[kind])


def test_hugging_face_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    TOKENIZER.to_huggingface(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*SAMPLES.values(), " \n\t x'S 1234 é\u0301 👍🏽\r\n\n", "don't  stop"):
        ids = TOKENIZER.encode(text)
        assert peer.encode(text).ids == ids
        assert peer.decode(ids) == text
    assert [peer.token_to_id(name) for name in SPECIAL_TOKENS] == [*TOKENIZER.specials.values()]
    assert peer.get_vocab_size() == TOKENIZER.vocab_size


@pytest.mark.parametrize("unit", ["x", " ", "\n", "1", "!", "é", "ab", "한", "\x00"])
def test_a_million_characters_of_a_kind_encode_in_no_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.monotonic()
    ids = TOKENIZER.encode(text)
    assert time.monotonic() - start < 5  # 0.1 s on an idle core; a quadratic way takes minutes
    assert TOKENIZER.decode(ids) == text


def test_a_cache_full_of_other_words_changes_no_ids() -> None:
    words = [f"{i:x}-{i * 7919:o}" for i in range(20_000)]
    once = TOKENIZER.encode_batch(words, 1)
    assert TOKENIZER.encode_batch(words[::-1], 1)[::-1] == once
    assert TOKENIZER.encode(" ".join(words)) == TIKTOKEN.encode_ordinary(" ".join(words))


def test_a_batch_equals_its_texts_one_by_one() -> None:
    documents = [SAMPLES["news"][i : i + 500] for i in range(900)] + ["", "x"]
    expected = [TOKENIZER.encode(text) for text in documents]
    assert TOKENIZER.encode_batch(documents) == expected
    assert TOKENIZER.encode_batch(documents, threads=3) == expected
    assert TOKENIZER.encode_batch([]) == []


def test_empty_and_one_byte_texts() -> None:
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.encode("a") == [97]
    assert TOKENIZER.decode([]) == ""


def test_special_tokens_have_names_and_never_come_out_of_text() -> None:
    first = TOKENIZER.vocab_size - 9
    assert [TOKENIZER.special(name) for name in SPECIAL_TOKENS] == list(range(first, first + 9))
    assert TOKENIZER.bos == first
    text = "".join(SPECIAL_TOKENS)
    ids = TOKENIZER.encode(text)
    assert max(ids) < first
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([TOKENIZER.bos, 97]) == "<|bos|>a"
    with pytest.raises(ValueError, match=r"'<\|eos\|>' is not a special token; there are <\|bos\|>, "):
        TOKENIZER.special("<|eos|>")


def test_token_bytes_are_raw_bytes_and_none_for_specials() -> None:
    sizes = TOKENIZER.token_bytes()
    assert len(sizes) == TOKENIZER.vocab_size
    assert sizes[:256] == [1] * 256  # also those of which no byte is valid UTF-8 alone
    assert sizes[-9:] == [0] * 9
    for text in SAMPLES.values():
        assert sum(sizes[i] for i in TOKENIZER.encode(text)) == len(text.encode())


def test_half_a_character_decodes_to_a_replacement() -> None:
    assert TOKENIZER.decode([0xED, 97]) == "\ufffda"
    assert TOKENIZER.decode_bytes([0xED, 97]) == b"\xeda"


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: TOKENIZER.encode("a\udfff"), ValueError, "the text has a lone surrogate at character 1"),
        (lambda: TOKENIZER.encode_batch(["a", "\ud800"]), ValueError, "text 1 has a lone surrogate"),
        (lambda: TOKENIZER.encode(b"bytes"), TypeError, "bytes"),
        (lambda: TOKENIZER.encode_batch(["a", None]), TypeError, "text 1 is of type NoneType, not str"),
        (lambda: TOKENIZER.encode_batch("text"), TypeError, "texts is one str; pass a list of str"),
        (lambda: TOKENIZER.decode([5000]), ValueError, "id 5000 is outside the vocabulary of 1200 ids"),
        (lambda: TOKENIZER.decode([-1]), OverflowError, "out of range"),
        (lambda: Encoder([(97, 256)]), ValueError, r"merge 0 is \(97, 256\), but only ids below 256 exist"),
        (lambda: Encoder([(97, 98), (97, 98)]), ValueError, "which an earlier merge is too"),
        (
            lambda: Encoder([(97, 98), (98, 99), (256, 99), (97, 257)]),
            ValueError,
            "merge 3 makes id 259 of the same bytes as id 258",
        ),
        (lambda: Tokenizer([], specials=["<|eos|>"]), ValueError, "must be distinct and include <|bos|>"),
    ],
)
def test_bad_input_is_an_error(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


def test_a_saved_tokenizer_loads_as_it_was(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.tokens() == TOKENIZER.tokens()
    assert [path.name for path in tmp_path.iterdir()] == ["bpe.json"]


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    merges = list(TOKENIZER.merges)
    same = Tokenizer(merges)
    others = [Tokenizer(merges[:-1]), Tokenizer(merges, pattern=r"\S+|\s+"), train(["abc"], 300)]
    assert same.fingerprint == TOKENIZER.fingerprint
    assert len({TOKENIZER.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_another_pattern_is_kept_and_used(tmp_path: Path) -> None:
    Tokenizer([(97, 32), (256, 97)], pattern="(?s:.+)").save(tmp_path)
    assert load_tokenizer(tmp_path).encode("a a") == [257]


def test_a_damaged_or_foreign_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bpe.json"
    with pytest.raises(ValueError, match=r"has no bpe\.json, so it is not a tokenizer's directory"):
        load_tokenizer(tmp_path)
    TOKENIZER.save(tmp_path)
    whole = path.read_bytes()
    content = json.loads(whole)
    for broken, sentence in [
        (whole[:-100], "is damaged, it is not JSON"),
        (b"\x80\x04\x95pickle", "is damaged, it is not JSON"),
        (b"[]", "is not one of our tokenizers"),
        (json.dumps({"version": "1.0", "model": {}}).encode(), "is not one of our tokenizers"),
        (json.dumps(content | {"version": 2}).encode(), "has layout version 2, this program reads 1; update"),
        (json.dumps(content | {"merges": content["merges"][:-1]}).encode(), "damaged or was edited"),
        (json.dumps(content | {"merges": [[1]]}).encode(), "a part is missing or malformed"),
        (json.dumps({k: v for k, v in content.items() if k != "sha256"}).encode(), "a part is missing"),
        (json.dumps(content | {"specials": 3}).encode(), "a part is missing or malformed"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=sentence):
            load_tokenizer(tmp_path)


def test_every_cut_of_the_file_is_noticed(tmp_path: Path) -> None:
    Tokenizer([(97, 98), (256, 99)]).save(tmp_path)
    path = tmp_path / "bpe.json"
    whole = path.read_bytes()
    for size in range(len(whole) - 1):  # without the line end alone nothing is missing
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            load_tokenizer(tmp_path)
