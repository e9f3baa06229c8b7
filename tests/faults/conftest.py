"""A finished `tiny` run to break: made once, copied for each test."""

import shutil
from pathlib import Path

import pytest
from killing import tiny

from nanochat_core import launch


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory of a run that nothing happened to."""
    base_dir = tmp_path_factory.mktemp("undisturbed")
    plan = tiny(base_dir)
    for name in ("assets", "shards_head", "shards", "tokenizer", "pretrain", "mid", "sft", "rl"):
        launch.launch(plan, name)
    return base_dir


@pytest.fixture
def before(undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The same run as it was before a stage began (`request.param`)."""
    base_dir = tmp_path / "base"
    shutil.copytree(undisturbed, base_dir)
    shutil.rmtree(base_dir / request.param)
    return base_dir
