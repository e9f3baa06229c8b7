"""A computer of one's own for a drill or a measurement: `nanochat up` in a temporary directory, a free port.

All that belongs to it is known by NANOCHAT_BASE_DIR in its environment, so nothing else is ever touched.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SERVICES = ("supervisor", "server", "worker", "recovery")
POSTGRES = Path("/usr/lib/postgresql/15/bin")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def role(words: list[str]) -> str | None:
    """What a process of the machine does, by its command line."""
    text = " ".join(words)
    for name, mark in (
        ("supervisor", "flows.services"),
        ("recovery", "flows.recovery"),
        ("worker", "worker start"),
        ("server", "server start"),
        ("server", "prefect.server.api.server:create_app"),
        ("stage", "nanochat_core.runner.launch"),
        ("flow", "prefect.engine"),
        ("flow", "flow-run execute"),
        ("command", "nanochat_core.cli.main"),
    ):
        if mark in text:
            return name
    return "other"


class Machine:
    def __init__(self, root: Path, **env: str) -> None:
        self.base, self.port = root / "base", free_port()
        self.base.mkdir(parents=True, exist_ok=True)
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.env = {
            "NANOCHAT_BASE_DIR": str(self.base),
            "PREFECT_HOME": str(root / "prefect"),
            "PREFECT_API_URL": "",
            "NANOCHAT_BOOT_ID": str(uuid.uuid4()),  # ours until the power goes
            "OMP_NUM_THREADS": "1",
        } | env

    def command(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "nanochat_core.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | self.env,
            start_new_session=True,
        )

    def nanochat(self, *words: str) -> str:
        process = self.command(*words)
        said, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"nanochat {' '.join(words)} ended with {process.returncode}:\n{said}")
        return said

    def up(self) -> None:
        self.nanochat("up", "--port", str(self.port))

    def down(self) -> None:
        self.nanochat("down")

    # Its processes.

    def processes(self, *roles: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("NANOCHAT_BASE_DIR") != str(self.base):
                    continue
                if process.status() != psutil.STATUS_ZOMBIE and (
                    not roles or role(process.cmdline()) in roles
                ):
                    found.append(process)
        return found

    def strangers(self) -> list[str]:
        """Command lines of its processes that are no services."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if role(words := process.cmdline()) not in SERVICES:
                    found.append(" ".join(words)[:120])
        return found

    def kill(self, *roles: str, number: signal.Signals = signal.SIGKILL) -> int:
        found = self.processes(*roles)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        return len(found)

    def power_cut(self) -> int:
        """All ends at once, and what was being started meanwhile. What starts next is of another boot."""
        killed = 0
        while found := self.kill():
            killed += found
        self.env["NANOCHAT_BOOT_ID"] = str(uuid.uuid4())
        return killed

    def stage(self) -> str | None:
        """The stage whose process is at work."""
        for process in self.processes("stage"):
            with contextlib.suppress(psutil.Error, IndexError):
                return Path(process.cmdline()[-1]).relative_to(self.base).parts[0]
        return None

    # Its Prefect server.

    def ask(self, path: str, content: Any = None, *, patience: float = 120.0) -> Any:
        body = None if content is None else json.dumps(content).encode()
        deadline = time.monotonic() + patience
        while True:
            try:
                request = urllib.request.Request(
                    f"{self.api}/{path}", body, {"content-type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.load(answer)
            except OSError as error:
                away = not isinstance(error, urllib.error.HTTPError) or error.code >= 500
                if not away or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def start(self, profile: str = "tiny", **parameters: Any) -> str:
        deployment = self.ask(f"deployments/name/speedrun/{profile}")["id"]
        run = self.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})
        return str(run["id"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"flow_runs/{run}")["state"])

    def set_state(self, run: str, kind: str, name: str) -> None:
        self.ask(f"flow_runs/{run}/set_state", {"state": {"type": kind, "name": name}, "force": True})

    def unfinished(self) -> int:
        """Flow runs that would take a slot of the pool."""
        states = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
        return int(self.ask("flow_runs/count", {"flow_runs": {"state": states}}))


def until(condition: Callable[[], object], seconds: float, every: float = 0.2) -> float | None:
    """The seconds until something was so; None if it did not come."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if condition():
            return time.monotonic() - begin
        time.sleep(every)
    return None


class Postgres:
    """A PostgreSQL of the machine's own, run by the user postgres where we are root."""

    def __init__(self, root: Path) -> None:
        self.data, self.port = root / "postgres", free_port()
        self.data.mkdir(parents=True)
        self.sudo = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.sudo:
            shutil.chown(self.data, "postgres")
        self._run("initdb", "-D", str(self.data), "-A", "trust", "-U", "prefect")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "prefect")
        self.url = f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/prefect"

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(
            [*self.sudo, str(POSTGRES / program), *words], check=True, stdout=subprocess.DEVNULL, cwd="/"
        )

    def start(self) -> None:
        options = f"-p {self.port} -k {self.data} -c listen_addresses=127.0.0.1"
        log = str(self.data / "log")
        self._run("pg_ctl", "-D", str(self.data), "-l", log, "-w", "-o", options, "start")

    def cut(self) -> None:
        """As a power cut leaves it: no checkpoint, to be recovered from its log."""
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "stop")

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in (self.data / "base").rglob("*") if path.is_file())
