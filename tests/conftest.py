"""What tests of several parts share: the toy profile, and commands run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from toys import Command, Toy


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory in which the real pipeline has run once, at its smallest. Leave it as it was found."""
    base = tmp_path_factory.mktemp("tiny") / "base"
    done = subprocess.run(
        [sys.executable, "-m", "nanochat_core.cli.main", "run", "tiny", "--base-dir", str(base)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PREFECT_API_URL": "", "PREFECT_HOME": str(base.parent / "prefect")},
    )
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert report.name == "report.md" and report.is_file()
    return base


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Toy":
    """The toy profile over a base directory of the test's."""
    from toys import Toy

    from nanochat_core.runner import launch

    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Toy(tmp_path / "base")


@pytest.fixture
def nanochat(tmp_path: Path) -> "Command":
    """The command in a process of its own, over a base directory of the test's."""

    def run(
        *words: str, env: dict[str, str] | None = None, **more: Any
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "nanochat_core.cli.main", *words],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=os.environ
            | {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "PREFECT_API_URL": ""}
            | (env or {}),
            **more,
        )

    return run
