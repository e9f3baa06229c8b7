"""`nanochat up`, a deployment's run and a power cut: all killed at once, started again, with nobody there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SLOW_ENOUGH = "pretrain.steps=600"


class Machine:
    """A computer of its own: a base directory, a Prefect home, a port."""

    def __init__(self, root: Path) -> None:
        self.base = root / "base"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.env = {
            "NANOCHAT_BASE_DIR": str(self.base),
            "PREFECT_HOME": str(root / "prefect"),
            "PREFECT_API_URL": "",
        }

    def nanochat(self, *words: str) -> str:
        command = [sys.executable, "-m", "flows.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def up(self) -> None:
        self.nanochat("up", "--port", str(self.port))

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("NANOCHAT_BASE_DIR") == str(self.base)
                    and process.status() != "zombie"
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ask(self, path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        with urlopen(
            Request(f"{self.api}/{path}", body, {"content-type": "application/json"}), timeout=20
        ) as answer:
            return json.load(answer)

    def start(self, *overrides: str) -> str:
        deployment = self.ask("deployments/name/speedrun/tiny")["id"]
        return str(
            self.ask(
                f"deployments/{deployment}/create_flow_run", {"parameters": {"overrides": list(overrides)}}
            )["id"]
        )

    def state(self, run: str) -> str:
        return str(self.ask(f"flow_runs/{run}")["state"]["name"])

    def step(self) -> int:
        """How far pretraining is, by its checkpoints."""
        steps = [
            int(path.name.removeprefix("step_"))
            for path in self.base.glob("pretrain/*/checkpoints/step_????????")
        ]
        return max(steps, default=-1)


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    yield found
    for process in found.processes():
        process.kill()


def test_a_run_survives_a_power_cut_and_a_restart_of_the_services_with_nobody_in_the_room(
    machine: Machine,
) -> None:
    machine.up()
    run = machine.start(SLOW_ENOUGH)
    until(lambda: machine.step() >= 50, 120)
    cut = machine.processes()
    assert len(cut) >= 6  # supervisor, server, worker, reconciler, flow, stage
    for process in cut:
        process.send_signal(signal.SIGKILL)
    at = machine.step()
    machine.up()
    begin = time.monotonic()
    until(lambda: machine.step() > at, 120)
    assert time.monotonic() - begin < 120
    machine.nanochat("down")  # and now on purpose: the stage saves, nobody is left
    until(lambda: machine.processes() == [], 30)
    at = machine.step()
    machine.up()
    until(lambda: machine.state(run) in ("Completed", "Failed"), 400)
    assert machine.state(run) == "Completed"
    (attempts,) = machine.base.glob("pretrain/*/attempts.jsonl")
    events = [json.loads(line)["event"] for line in attempts.read_text().splitlines()]
    assert events.count("started") == 3 and events[-1] == "finished"
    others = [path for path in machine.base.glob("*/*/attempts.jsonl") if path != attempts]
    assert all(path.read_text().count('"started"') == 1 for path in others)  # nothing finished ran twice
    assert machine.ask("work_pools/nanochat")["status"] == "READY"
    machine.nanochat("down")
    until(lambda: machine.processes() == [], 30)
