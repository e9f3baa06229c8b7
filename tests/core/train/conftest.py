"""A tokenizer, text and a beginning for runs of a second."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tinytrain import WORLD, documents, tiny_model

from nanochat_core.artifacts.store import sha256
from nanochat_core.optim.schedule import Rates
from nanochat_core.sources.documents import Shard
from nanochat_core.tokenizer.bpe import Tokenizer, train
from nanochat_core.train.checkpoint import TrainState
from nanochat_core.train.setup import new_state


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
        found.append(Shard(path.name, path, path.stat().st_size, sha256(path), 40, 3))
    return found


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
