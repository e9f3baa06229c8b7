"""What `up`, `down` and `status` do around the services: toy processes and a toy server, no Prefect."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import PROFILE, Command, Toy

from flows import server, services
from flows.server import Supervisor
from nanochat_core.artifacts import orphans, store
from nanochat_core.machine.installed import deployment
from nanochat_core.runner import plan
from nanochat_core.runner.status import at_work

SLOW_TO_END = """
import signal, sys, time
def end(*_):
    time.sleep(0.5)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
STAGE = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    (pathlib.Path(sys.argv[-1]).parent / "checkpoints" / "step_00000007").mkdir(parents=True)
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[-1]).write_text("{}")
time.sleep(60)
"""
FLOW = """
import os, pathlib, signal, subprocess, sys, time
from flows.recovery import present
base, run, stage = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
job = base / "pretrain" / run / "job.json"
job.parent.mkdir(parents=True)
with present(base, run, 1):
    env = os.environ | {"NANOCHAT_PARENT": str(os.getpid())}
    child = subprocess.Popen([sys.executable, "-c", stage, "nanochat_core.runner.launch", str(job)], env=env)
    def end(*_):
        child.terminate()
        child.wait()
        sys.exit()
    signal.signal(signal.SIGTERM, end)
    time.sleep(60)
"""


class Answers(ThreadingHTTPServer):
    """A server that answers each path with what it was given for it."""

    said: dict[str, Any]

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/api"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        said = self.server.said.get(self.path.removeprefix("/api/"))  # type: ignore[attr-defined]
        self.send_response(404 if said is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def somebody() -> Iterator[Answers]:
    with Answers(("127.0.0.1", 0), Handler) as found:
        found.said = {"health": True}
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A base directory, and an end for whatever a test leaves at work in it."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_API_URL", "")
    path = tmp_path / "base"
    services.folder(path).mkdir(parents=True)
    yield path
    if (last := server.supervised(path)) is not None and last.pid != os.getpid():
        os.kill(last.pid, signal.SIGKILL)
    for name in services.NAMES:
        if (pid := services.holder(services.folder(path), name)) is not None:
            os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def supervisor(base: Path, **env: str) -> "subprocess.Popen[bytes]":
    """A supervisor that starts nothing, because its server never answers."""
    ours = {key: value for key, value in os.environ.items() if key != "INVOCATION_ID"}
    command = [sys.executable, "-m", "flows.services", str(base), "http://127.0.0.1:9/api", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ours | env)
    until(lambda: (now := server.supervised(base)) is not None and now.pid == process.pid)
    return process


def note(base: Path, url: str, port: int, pid: int = 0, start: int = 0) -> None:
    record = Supervisor(pid, start, url, port, None)
    store.write_json(services.folder(base) / "supervisor.json", record._asdict())


def toy_service(base: Path, name: str) -> "subprocess.Popen[bytes]":
    where = services.folder(base)
    process = services.service(name, [sys.executable, "-c", SLOW_TO_END], where, dict(os.environ))
    while "ready" not in (where / f"{name}.log").read_text():  # a signal before that would just end it
        time.sleep(0.01)
    return process


# Whose server an address is.


def test_the_address_that_up_advised_to_export_is_its_own_when_it_is_down(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://127.0.0.1:4431/api"
    note(base, url, 4431)
    for exported in (url, "http://localhost:4431/api", url + "/"):
        monkeypatch.setenv("PREFECT_API_URL", exported)
        assert services.choose(base, None) == (url, 4431)
        assert services.choose(base, 4432) == ("http://127.0.0.1:4432/api", 4432)  # it may move
        assert server.address(base) is None  # nobody is there: a run by hand brings its own server
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert services.choose(base, None) == ("http://127.0.0.1:4200/api", 4200)
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example/api")
    assert services.choose(base, None) == ("https://prefect.example/api", 0)
    assert server.address(base) == "https://prefect.example/api"


def test_a_run_by_hand_uses_the_server_that_is_up(base: Path, somebody: Answers) -> None:
    me = services.this_process()
    note(base, somebody.api, somebody.server_port, me.pid, me.start)
    with store.locked(services.folder(base) / "supervisor.lock"):
        assert server.prepare(base) == os.environ["PREFECT_API_URL"] == somebody.api
    assert not (base / "prefect" / "server.log").exists()


def test_only_a_prefect_server_is_healthy(somebody: Answers) -> None:
    assert server.healthy(somebody.api)
    for said in (False, {"status": "ok"}, None):
        somebody.said = {"health": said}
        assert not server.healthy(somebody.api)


# Up.


def test_up_refuses_a_port_that_somebody_else_has(base: Path, somebody: Answers) -> None:
    with pytest.raises(ValueError, match=f"port {somebody.server_port} is taken by another program; name"):
        services.up(base, somebody.server_port)
    assert not (services.folder(base) / "supervisor.log").exists()


def test_an_up_that_fails_ends_the_supervisor_it_started(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "STARTUP_SECONDS", 3.0)
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.invalid:9/api")
    with pytest.raises(ConnectionError, match=r"no Prefect server answers.*unset PREFECT_API_URL"):
        services.up(base)
    assert not at_work(services.folder(base) / "supervisor.lock")


def test_up_on_another_port_says_where_it_is_up_already(base: Path) -> None:
    me = services.this_process()
    note(base, "http://127.0.0.1:4431/api", 4431, me.pid, me.start)
    with (
        store.locked(services.folder(base) / "supervisor.lock"),
        pytest.raises(ValueError, match=r"already up at http://127.0.0.1:4431; nanochat down first"),
    ):
        services.up(base, 4432)


def test_deployments_of_our_own_server_name_the_base_directory(base: Path) -> None:
    path = services.deployments(base)
    flows = yaml.safe_load(path.read_text())["deployments"]
    given = [one["parameters"]["base_dir"] for one in flows if one["entrypoint"].endswith("speedrun")]
    assert len(given) > 5 and set(given) == {str(base)}
    assert services.deployments(None) == deployment("prefect.yaml")


def test_up_does_not_join_the_server_of_another_base_directory(
    base: Path, somebody: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", somebody.api)
    somebody.said["deployments/name/speedrun/tiny"] = {"parameters": {"base_dir": "/srv/other"}}
    with pytest.raises(ValueError, match="is that of /srv/other; unset PREFECT_API_URL"):
        services.up(base)
    assert not (services.folder(base) / "supervisor.log").exists()


def test_a_second_supervisor_leaves_with_a_code_of_its_own(base: Path) -> None:
    first = supervisor(base)
    command = [sys.executable, "-m", "flows.services", str(base), "http://127.0.0.1:9/api", "0"]
    assert subprocess.run(command, capture_output=True).returncode == services.ALREADY_UP
    first.terminate()
    assert first.wait(30) == 0


# Down.


def test_two_downs_at_once_end_everything_in_order(base: Path) -> None:
    process = supervisor(base)
    toys = [toy_service(base, name) for name in services.NAMES]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(services.down, [base, base]))
    assert process.wait(30) == 0  # it ended in order, told twice or not
    assert [toy.wait(10) for toy in toys] == [0, 0, 0]
    assert list(services.NAMES) in said
    assert services.down(base) == []


def test_a_supervisor_told_again_and_again_still_ends_all(base: Path) -> None:
    process = supervisor(base)
    toys = [toy_service(base, name) for name in services.NAMES]
    while process.poll() is None:
        process.terminate()
        time.sleep(0.1)
    assert process.returncode == 0 and [toy.wait(10) for toy in toys] == [0, 0, 0]


def test_a_number_that_now_belongs_to_another_process_is_left_alone(base: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW_TO_END]) as innocent:
        found = orphans.process(innocent.pid)
        assert found is not None
        note(base, "http://127.0.0.1:4431/api", 4431, found.pid, found.start - 1)
        lock = services.folder(base) / "worker.lock"
        lock.write_text(json.dumps(found._replace(start=found.start - 1)))
        with store.locked(lock):
            assert services.holder(services.folder(base), "worker") is None
        assert services.down(base) == []
        assert innocent.poll() is None
        innocent.kill()


@pytest.mark.parametrize("text", ["", "[12", "12", '{"pid": 1}'])
def test_a_note_cut_short_by_a_power_cut_is_no_note(base: Path, text: str) -> None:
    (services.folder(base) / "worker.lock").write_text(text)
    (services.folder(base) / "supervisor.json").write_text(text)
    assert services.holder(services.folder(base), "worker") is None
    assert server.last_supervisor(base) is None and services.down(base) == []


def test_down_leaves_to_systemd_what_systemd_would_start_again(base: Path) -> None:
    process = supervisor(base, INVOCATION_ID="abc", MANAGERPID="1")
    with pytest.raises(ValueError, match="systemctl --user stop nanochat"):
        services.down(base)
    process.terminate()
    assert process.wait(30) == 0


def test_down_ends_a_flow_whose_worker_was_replaced_and_its_stage_saves_first(base: Path) -> None:
    def flow(run: str, **env: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-c", FLOW, str(base), run, STAGE], env=os.environ | env, start_new_session=True
        )
        until(lambda: (base / "pretrain" / run / "job.json").exists())
        return process

    ours, by_hand = flow("one", PREFECT__FLOW_RUN_ID="one"), flow("two")
    try:
        assert services.down(base) == ["a run", "pretrain (kept at step 7)"]
        assert ours.wait(10) == 0
        assert by_hand.poll() is None and not list(base.glob("pretrain/two/checkpoints/*"))
    finally:
        for process in (ours, by_hand):
            process.terminate()
            process.wait(30)


def test_down_waits_for_a_stage_that_saves_after_its_flow_is_gone(base: Path) -> None:
    job = base / "pretrain" / "one" / "job.json"
    job.parent.mkdir(parents=True)
    stage = subprocess.Popen(
        [sys.executable, "-c", STAGE, "nanochat_core.runner.launch", str(job)],
        env=os.environ | {"NANOCHAT_PARENT": "1"},
    )
    until(job.exists)
    stage.terminate()
    assert services.down(base) == ["pretrain (kept at step 7)"]
    assert stage.wait(1) == 0


# Status.


def test_between_two_stages_status_says_how_to_end_the_run_not_how_to_start_another(
    toy: Toy, nanochat: Command, somebody: Answers
) -> None:
    plan.remember(toy.plan())
    run = {"id": "1f2e", "name": "bold-fox", "state_name": "Running", "parameters": {"profile": str(PROFILE)}}
    somebody.said["flow_runs/filter"] = [run]
    done = nanochat("status", str(PROFILE), env={"PREFECT_API_URL": somebody.api})
    assert done.returncode == 0, done.stderr
    assert "in Prefect: bold-fox  Running" in done.stdout and "nanochat run" not in done.stdout
    assert f"to end it: PREFECT_API_URL={somebody.api} prefect flow-run cancel 1f2e" in done.stdout
    run["parameters"] = {"profile": "cpu-demo"}
    done = nanochat("status", str(PROFILE), env={"PREFECT_API_URL": somebody.api})
    assert "to go on: nanochat run" in done.stdout
