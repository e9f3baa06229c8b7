"""`nanochat up`, a deployment's run and a power cut: all killed at once, started again, with nobody there."""

import base64
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
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SLOW_ENOUGH = "pretrain.steps=600"


class Machine:
    """A computer of its own: a base directory, a Prefect home, a port."""

    def __init__(self, root: Path, password: str | None = None) -> None:
        self.password = password
        self.base = root / "base"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.env = {
            "NANOCHAT_BASE_DIR": str(self.base),
            "PREFECT_HOME": str(root / "prefect"),
            "PREFECT_API_URL": "",
            "OMP_NUM_THREADS": "1",
        } | ({"PREFECT_SERVER_API_AUTH_STRING": password} if password else {})

    def nanochat(self, *words: str) -> str:
        command = [sys.executable, "-m", "nanochat_core.cli.main", *words]
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
        headers = {"content-type": "application/json"}
        if self.password:
            headers["authorization"] = f"Basic {base64.b64encode(self.password.encode()).decode()}"
        for _ in range(20):
            try:
                with urlopen(Request(f"{self.api}/{path}", body, headers), timeout=20) as answer:
                    return json.load(answer)
            except HTTPError as busy:  # SQLite has one writer
                if busy.code != 503:
                    raise
                time.sleep(0.5)
        raise AssertionError(f"the server is busy for ever: {path}")

    def start(self, *overrides: str, until: str | None = None) -> str:
        deployment = self.ask("deployments/name/speedrun/tiny")["id"]
        parameters = {"overrides": list(overrides), "until": until}
        run = self.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})
        return str(run["id"])

    def find(self, mark: str) -> list[psutil.Process]:
        """Its processes with these words in their command lines."""
        return [process for process in self.processes() if mark in " ".join(process.cmdline())]

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
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """`request.param` is the password of its server."""
    found = Machine(tmp_path, getattr(request, "param", None))
    yield found
    for process in found.processes():
        process.kill()


def test_a_run_survives_a_power_cut_and_a_restart_of_the_services_with_nobody_in_the_room(
    machine: Machine,
) -> None:
    machine.up()
    run = machine.start(SLOW_ENOUGH, until="base_loss")
    until(lambda: machine.step() >= 50, 120)
    cut = machine.processes()
    assert len(cut) >= 6  # supervisor, server, worker, reconciler, flow, stage
    for process in cut:
        process.send_signal(signal.SIGKILL)
    at = machine.step()
    machine.env["NANOCHAT_BOOT_ID"] = "the one after the power cut"
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


@pytest.mark.parametrize("machine", ["admin:secret"], indirect=True)
def test_a_server_with_a_password_is_used_by_all_that_is_ours_and_by_nobody_else(machine: Machine) -> None:
    machine.up()
    with pytest.raises(HTTPError, match="401"), urlopen(f"{machine.api}/admin/version", timeout=20):
        pass
    run = machine.start(until="shards_head")
    until(lambda: machine.state(run) in ("Completed", "Failed", "Crashed"), 120)
    assert machine.state(run) == "Completed"  # the worker and the flow's process know it
    artifacts = machine.ask("artifacts/filter", {})
    assert {"assets-progress", "shards-head-progress"} & {
        found["key"] for found in artifacts
    }  # so does watch
    log = machine.base / "prefect" / "services" / "recovery.log"
    assert "401" not in log.read_text() and "not now" not in log.read_text()
    waiting = machine.start(until="shards_head")
    assert waiting and "in Prefect: " in machine.nanochat("status", "tiny")
    machine.env["PREFECT_API_URL"] = machine.api
    machine.nanochat("run", "tiny", "--until", "tokenizer")  # and the command
    until(lambda: machine.state(waiting) == "Completed", 120)


def test_training_goes_on_while_the_server_is_away_and_a_killed_supervisor_leaves_nothing_double(
    machine: Machine,
) -> None:
    machine.up()
    run = machine.start("pretrain.steps=800", until="pretrain")
    until(lambda: machine.step() >= 20, 120)
    (supervisor,) = machine.find("flows.services")
    supervisor.kill()
    for process in machine.find("prefect server start"):
        process.kill()
    at = machine.step()
    until(lambda: machine.step() > at + 40, 120)  # nobody answers, and nobody starts the server again
    assert not machine.find("prefect server start")
    machine.up()
    assert (
        len(machine.find("worker start")) == len(machine.find("flows.recovery")) == 1
    )  # those that lived on
    until(lambda: machine.state(run) in ("Completed", "Failed", "Crashed"), 300)
    assert machine.state(run) == "Completed"
    (attempts,) = machine.base.glob("pretrain/*/attempts.jsonl")
    assert attempts.read_text().count('"started"') == 1  # it never noticed
    machine.nanochat("down")
    until(lambda: machine.processes() == [], 30)


def test_up_goes_by_its_own_note_and_down_ends_a_flow_whose_worker_was_replaced(machine: Machine) -> None:
    machine.up()
    machine.env["PREFECT_API_URL"] = machine.api  # as `up` advises
    assert machine.nanochat("down").startswith("down: recovery, worker, server")
    machine.nanochat("up")
    assert machine.find("prefect server start") and f"up: {machine.api[:-4]} " in machine.nanochat("up")
    run = machine.start("pretrain.steps=3000", until="pretrain")
    until(lambda: machine.step() >= 20, 120)
    assert machine.ask(f"flow_runs/{run}")["parameters"]["base_dir"] == str(machine.base)
    (worker,) = machine.find("worker start")
    worker.kill()
    until(lambda: len(machine.find("worker start")) == 1, 60)
    said = machine.nanochat("down")
    assert "a run, pretrain (kept at step " in said
    until(lambda: machine.processes() == [], 10)
    (attempts,) = machine.base.glob("pretrain/*/attempts.jsonl")
    assert json.loads(attempts.read_text().splitlines()[-1])["why"] == "interrupted"
