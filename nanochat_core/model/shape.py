"""A model's shape, as plain numbers: what a plan can know about a model without building it."""

from dataclasses import dataclass
from typing import Literal

SMEAR_CHANNELS = 24  # the smear gate reads this many channels of the embedding
VALUE_GATE_CHANNELS = 12  # and a value embedding's gate this many of the stream


@dataclass(frozen=True)
class GPTConfig:
    """A model's shape. Everything else about it follows from `arch`."""

    arch: Literal["seed", "modern"] = "modern"
    sequence_len: int = 2048
    vocab_size: int = 32_768
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280

    def __post_init__(self) -> None:
        if self.arch not in ("seed", "modern"):
            raise ValueError(f"arch {self.arch!r} is not known; it is 'seed' or 'modern'")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"{self.n_head} heads do not divide a width of {self.n_embd} into even parts")
        if self.arch == "modern" and self.n_embd < SMEAR_CHANNELS:
            raise ValueError(
                f"a modern model is at least {SMEAR_CHANNELS} wide, not {self.n_embd}; use more heads"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_kv_head} key heads do not divide {self.n_head} query heads")

    @classmethod
    def of_depth(
        cls,
        depth: int,
        vocab_size: int,
        *,
        arch: Literal["seed", "modern"] = "modern",
        sequence_len: int = 2048,
        aspect: int = 64,
        head_dim: int = 128,
    ) -> "GPTConfig":
        """The family's shape at a depth: width = depth x aspect, rounded up to whole heads."""
        n_head = max(1, -(-depth * aspect // head_dim))
        return cls(arch, sequence_len, vocab_size, depth, n_head, n_head, n_head * head_dim)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def positions(self) -> int:
        """How far the rotary positions reach: ten times the trained length, as upstream has it, so that chat
        and long examples may run past it."""
        return 10 * self.sequence_len

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and head: `modern` rounds up to 64 so that matrix products stay aligned."""
        return self.vocab_size if self.arch == "seed" else -(-self.vocab_size // 64) * 64

    @property
    def rope_base(self) -> float:
        return 10_000.0 if self.arch == "seed" else 100_000.0

    @property
    def attention_scale(self) -> float:
        """The factor on normed queries and on normed keys; above 1 attention can be sharper."""
        return 1.0 if self.arch == "seed" else 1.2

    @property
    def backout_layer(self) -> int:
        """The layer whose output `modern` subtracts from the last one's."""
        return self.n_layer // 2

    def windows(self) -> list[int]:
        """How far back each layer looks: in `seed` to the very beginning; in `modern` three short layers (a
        quarter of the sequence), one long; the last is long."""
        if self.arch == "seed":
            return [self.positions] * self.n_layer
        long = self.sequence_len
        short = -(-long // 4 // 128) * 128
        return [
            long if i % 4 == 3 or i == self.n_layer - 1 else min(short, long) for i in range(self.n_layer)
        ]

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, the last included."""
        return self.arch == "modern" and layer % 2 == (self.n_layer - 1) % 2
