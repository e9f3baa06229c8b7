"""The finished `tiny` run as it was before one of its stages."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def before(tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the run without one stage (`request.param`)."""
    base_dir = tmp_path / "base"
    shutil.copytree(tiny_base, base_dir)
    shutil.rmtree(base_dir / request.param)
    return base_dir
