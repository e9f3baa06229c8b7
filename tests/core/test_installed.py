"""Processes that we start run what is installed, whatever lies in the working directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_core.machine.installed import module
from nanochat_core.runner.launch import environment


@pytest.mark.parametrize(
    ("command", "env", "says"),
    [
        pytest.param(module("nanochat_core", "--help"), os.environ, "Train your own ChatGPT", id="child"),
        # torchrun starts its ranks without -P, and Prefect's worker its flows
        pytest.param(
            [sys.executable, "-m", "nanochat_core.runner.launch"], environment(), "usage: ", id="grandchild"
        ),
    ],
)
def test_modules_in_the_working_directory_are_never_imported(
    tmp_path: Path, command: list[str], env: dict[str, str], says: str
) -> None:
    (tmp_path / "nanochat_core").mkdir()
    (tmp_path / "nanochat_core" / "__init__.py").write_text("raise SystemExit('imported from here')")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert says in done.stdout + done.stderr, done.stderr
