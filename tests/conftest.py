"""What tests of several parts share: the toy profile, and commands run as a user runs them."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from toys import Command, Toy

TINY = Path(__file__).with_name("tiny.py")


# Two workers on two cores: threads of one would only wait for those of the other. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PREFECT_API_URL"] = ""  # tests have servers of their own


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Single files run in this process: a second one would cost more to start than it saves."""
    if any("::" in arg or arg.endswith(".py") for arg in config.args):
        return 0
    return min(os.cpu_count() or 1, 8)  # each has torch in memory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Prefect server first: they stay with one worker, which starts one server."""
    items.sort(key=lambda item: "prefect_server" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory in which the real pipeline has run once, at its smallest, for all workers. Leave it as
    it was found."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    base, done = shared / "tiny" / "base", shared / "tiny" / "done"
    with FileLock(shared / "tiny.lock"):
        if not done.exists():
            made = subprocess.run([sys.executable, TINY, base], capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
            done.touch()
    return base


@pytest.fixture
def tiny_copy(tiny_base: Path, tmp_path: Path) -> Path:
    """The finished tiny run, for a test to change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Toy":
    """The toy profile over a base directory of the test's."""
    from toys import Toy

    from nanochat_core.runner import launch

    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
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


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator["Command"]:
    """The command in this process, which is quicker, over a base directory of the test's."""
    from nanochat_core.cli import main as cli

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def run(*words: str, env: dict[str, str | None] | None = None) -> "subprocess.CompletedProcess[str]":
        given = {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "PREFECT_API_URL": ""} | (env or {})
        environment = {name: value for name, value in (os.environ | given).items() if value is not None}
        monkeypatch.setattr(sys, "argv", ["nanochat", *words])
        with patch.dict(os.environ, environment, clear=True), pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(end.value.code or 0), said.out, said.err)

    yield run
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def here(toy: "Toy", command: "Command") -> "Command":
    """The command in this process over the toy table."""
    return command
