"""A model only trains on with the tokenizer it was trained with."""

from pathlib import Path

import pytest
from tinytrain import documents, tiny_model

from nanochat_core.infer.exported import trained_model
from nanochat_core.model.gpt import write_config
from nanochat_core.tokenizer.bpe import Tokenizer, train


def test_another_tokenizer_is_refused_before_weights_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_config(tmp_path, tiny_model(tokenizer).config, tokenizer.fingerprint)
    other = train(documents(90)[50:], 300)  # as many tokens, but not the same
    assert other.vocab_size == tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"was trained with tokenizer [0-9a-f]{12}, but"):
        trained_model(tmp_path, other)
