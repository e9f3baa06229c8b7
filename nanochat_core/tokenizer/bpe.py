"""The tokenizer: merges learned and applied by `nanochat_bpe`, kept as one JSON file with its own hash."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanochat_bpe import PATTERN, Encoder
from nanochat_bpe import train as learn_merges

from nanochat_core.tokenizer.special import SPECIAL_TOKENS

if TYPE_CHECKING:
    import tiktoken

FILE = "bpe.json"
FORMAT = "nanochat-bpe"
VERSION = 1  # of the file's layout
BYTES = 256  # ids 0..255 are the bytes themselves

Merge = tuple[int, int]
Progress = Callable[[Literal["read", "merge"], int, int | None], object]
"""Called as ("read", bytes so far, None), then as ("merge", merges so far, merges wanted)."""


class Tokenizer:
    """Text to ids and back: first the 256 bytes, then an id for each merge in order, then the specials."""

    def __init__(
        self, merges: Sequence[Merge], *, pattern: str = PATTERN, specials: Sequence[str] = SPECIAL_TOKENS
    ) -> None:
        if len(set(specials)) != len(specials) or "<|bos|>" not in specials:
            raise ValueError(
                f"special tokens must be distinct and include <|bos|>; got {', '.join(specials)}"
            )
        self.merges = tuple(merges)
        self.pattern = pattern
        self.specials = {name: BYTES + len(merges) + i for i, name in enumerate(specials)}
        self.vocab_size = BYTES + len(merges) + len(specials)
        self.fingerprint = _fingerprint(pattern, merges, specials)
        self.bos = self.specials["<|bos|>"]
        self._encoder = Encoder(merges, specials, pattern)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: what looks like a special token in it is text all the same."""
        return self._encoder.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each, on several threads (default: all cores)."""
        return self._encoder.encode_batch(texts, threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials spelt out; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoder.decode(list(ids))

    def special(self, name: str) -> int:
        """The id of a special token."""
        if name not in self.specials:
            raise ValueError(f"{name!r} is not a special token; there are {', '.join(self.specials)}")
        return self.specials[name]

    def tokens(self) -> list[bytes]:
        """The raw bytes of each id; often not valid UTF-8 on their own."""
        return self._encoder.tokens()

    def token_bytes(self) -> list[int]:
        """How many bytes of text each id stands for: 0 for specials, which no text contains."""
        ordinary = BYTES + len(self.merges)
        return [len(token) for token in self.tokens()[:ordinary]] + [0] * len(self.specials)

    def save(self, directory: Path) -> None:
        """Write bpe.json, whole or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "sha256": self.fingerprint,
            "pattern": self.pattern,
            "specials": list(self.specials),
            "merges": self.merges,
        }
        _write(directory / FILE, content)

    def to_tiktoken(self) -> "tiktoken.Encoding":
        """The same tokenizer as a tiktoken encoding; its `encode_ordinary` gives our ids."""
        import tiktoken

        ordinary = self.tokens()[: BYTES + len(self.merges)]
        return tiktoken.Encoding(
            f"nanochat-{self.fingerprint[:12]}",
            pat_str=self.pattern,
            mergeable_ranks={token: i for i, token in enumerate(ordinary)},
            special_tokens=self.specials,
            explicit_n_vocab=self.vocab_size,
        )

    def to_huggingface(self, directory: Path) -> None:
        """Write tokenizer.json for Hugging Face `tokenizers`. There, text can become a special."""
        letters = _byte_letters()
        ordinary = self.tokens()[: BYTES + len(self.merges)]
        names = ["".join(letters[byte] for byte in token) for token in ordinary]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in self.specials.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {name: i for i, name in enumerate(names)},
                "merges": [[names[a], names[b]] for a, b in self.merges],
            },
        }
        _write(directory / "tokenizer.json", content)


def train(
    texts: Iterable[str], vocab_size: int, *, threads: int | None = None, progress: Progress | None = None
) -> Tokenizer:
    """A tokenizer of `vocab_size` ids with the specials; of fewer when the texts have no more pairs."""
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {smallest}: "
            f"{BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    merges = learn_merges(texts, vocab_size - len(SPECIAL_TOKENS), threads=threads, progress=progress)
    return Tokenizer(merges)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote to a directory, once its hash is checked."""
    path = directory / FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no {FILE}, so it is not a tokenizer's directory")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}); train the tokenizer again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not one of our tokenizers: its format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        version = content.get("version")
        raise ValueError(
            f"{path} has layout version {version!r}, this program reads {VERSION}; update the program"
        )
    try:
        pattern, specials = str(content["pattern"]), [str(name) for name in content["specials"]]
        merges = [(int(a), int(b)) for a, b in content["merges"]]
        intact = content["sha256"] == _fingerprint(pattern, merges, specials)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, a part is missing or malformed ({error!r})") from None
    if not intact:
        raise ValueError(f"{path} is damaged or was edited: its content does not have the hash that it names")
    return Tokenizer(merges, pattern=pattern, specials=specials)


def _fingerprint(pattern: str, merges: Sequence[Merge], specials: Sequence[str]) -> str:
    identity = {"pattern": pattern, "merges": list(merges), "specials": list(specials)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    directory = path.parent
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(path)


def _byte_letters() -> list[str]:
    """GPT-2's spelling of bytes as letters: what Latin-1 can print, and U+0100 onwards for the rest."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]
