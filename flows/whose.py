"""Whose a flow run is: its worker bears the machine, the user and the base directory in its name, and Prefect
labels each run with the name of the worker that took it. Imports nothing of Prefect."""

import hashlib
import os
import socket
from pathlib import Path

WORKERS = "nanochat-"  # how the names of our workers begin


def worker_name(base_dir: Path) -> str:
    """The name of a base directory's worker on this machine: `prefect worker start --name ...`."""
    place = hashlib.sha256(str(base_dir.resolve()).encode()).hexdigest()[:8]  # a name may have no slash
    return f"{WORKERS}{os.getuid()}-{socket.gethostname()}-{place}"
