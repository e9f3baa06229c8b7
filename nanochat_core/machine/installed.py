"""What is installed here: commands that run our modules with this Python, and the files of `deployments/`."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# What -P is for one command, for all that a child starts itself: torchrun its ranks, a worker its flows.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


def module(name: str, *args: str) -> list[str]:
    """The command that runs an installed module; -P keeps the working directory off its import path."""
    return [sys.executable, "-P", "-m", name, *args]


def deployment(name: str) -> Path:
    """A file of `deployments/`, which a wheel holds inside this package and a checkout next to it."""
    inside = PACKAGE / "deployments"
    return (inside if inside.is_dir() else PACKAGE.parent / "deployments") / name
