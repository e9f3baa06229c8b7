"""What made an artefact: commit, versions, machine."""

import contextlib
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import store
from nanochat_core.machine import hardware


def provenance() -> dict[str, Any]:
    versions = {}
    for package in ("nanochat-flow", "nanochat-bpe", "torch", "prefect", "pyarrow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        **git_state(),
        "code": store.code_digest(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "host": socket.gethostname(),
        "hardware": hardware.describe(),
    }


def git_state() -> dict[str, Any]:
    """The commit this code was checked out at, if it was."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        return {
            "commit": git("rev-parse", "HEAD") or None,
            "dirty": bool(git("status", "--porcelain")),
        }
    except OSError:  # no git on this machine
        return {"commit": None, "dirty": None}


def git(*words: str) -> str:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
