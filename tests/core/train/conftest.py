"""A model, a tokenizer and text small enough to train in a second, in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_core.data.documents import Shard
from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.optim.schedule import Rates
from nanochat_core.stage import Job, Recipe, Runtime
from nanochat_core.tokenizer.bpe import Tokenizer, train
from nanochat_core.train.checkpoint import TrainState
from nanochat_core.train.ranks import World
from nanochat_core.train.setup import new_state

WORLD = World(0, 1, torch.device("cpu"), torch.float32)


def documents(n: int) -> list[str]:
    words = "the cat sat on a mat while rain fell over seven green hills and nobody said anything".split()
    return [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(3 + (i * 13) % 50)) for i in range(n)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(documents(50), 300)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Two files of 40 documents in groups of 16."""
    found = []
    for i in range(2):
        path = tmp_path / f"shard_{i}.parquet"
        texts = documents(80)[40 * i : 40 * (i + 1)]
        pq.write_table(pa.table({"text": texts}), path, row_group_size=16)
        found.append(Shard(path.name, path, path.stat().st_size, "", 40, 3))
    return found


def tiny_model(tokenizer: Tokenizer, arch: str = "modern", T: int = 32) -> GPT:
    config = GPTConfig.of_depth(
        2,
        tokenizer.vocab_size,
        arch=arch,  # type: ignore[arg-type]
        sequence_len=T,
        aspect=16,
        head_dim=16,
    )
    return GPT(config).init_weights(3)


@pytest.fixture
def fresh(tokenizer: Tokenizer) -> Callable[[], TrainState]:
    """A new, always equal, beginning of a run."""
    return lambda: new_state(tiny_model(tokenizer), Rates(weight_decay=0.1), WORLD)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_in(path: Path, **runtime: object) -> Job:
    path.mkdir(parents=True, exist_ok=True)
    settings = Runtime.model_validate({"base_dir": path.parent, "compile": False} | runtime)
    return Job("pretrain", Recipe(), {}, path, settings, "f" * 20)
