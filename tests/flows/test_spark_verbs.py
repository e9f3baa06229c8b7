"""`doctor`, `plan --compare` and `compare` as a user meets them, and the doctor as a run's first task."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from toys import PROFILE, Command, Toy

P = str(PROFILE)


def at(command: list[str], **env: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "nanochat_core.cli.main", *command]
    return subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"PREFECT_API_URL": ""} | env
    )


def test_two_profiles_side_by_side(command: Command, tmp_path: Path) -> None:
    words = ["plan", "dgx-spark", "--compare", "dgx-spark-seed", "--base-dir", str(tmp_path)]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    (params,) = [line.split() for line in done.stdout.splitlines() if line.startswith("params ")]
    assert params == ["params", "897", "M", "561", "M"]
    assert "1.9 to 2.6 days" in done.stdout and "9.1 to 10.1 days" in done.stdout
    document = json.loads(command(*words, "--json").stdout)
    assert document["dgx-spark-seed"]["params"] == 560_988_160 and list(tmp_path.iterdir()) == []


def test_a_gpu_is_asked_for_where_there_is_none(command: Command, tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    done = command("plan", "dgx-spark", "--calibrate", "--base-dir", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: profile dgx-spark is for a GPU")
    assert "Traceback" not in done.stderr


def test_two_runs_side_by_side_tell_what_differed_and_what_came_of_it(here: Command, toy: Toy) -> None:
    toy.make(toy.plan())
    first = json.loads(here("status", "--json").stdout)["stages"]["report"]["directory"]
    toy.make(toy.plan("sft.steps=9"))
    done = here("compare", first, P)
    assert done.returncode == 0, done.stderr
    assert "recipe  sft.steps" in done.stdout and "result  sft/chatcore" in done.stdout
    document = json.loads(here("compare", first, P, "--json").stdout)
    assert document["recipe"] == {"sft.steps": [5, 9]}
    assert document["metrics"]["sft/chatcore"] == [0.5, 0.5]
    wrong = here("compare", P, "nowhere")
    assert wrong.returncode == 2 and "there is no finished run of nowhere" in wrong.stderr


class Server(BaseHTTPRequestHandler):
    """As much of a Prefect server as the doctor asks for."""

    workers: ClassVar[list[dict[str, str]]] = []
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.answer(b"true")

    def do_POST(self) -> None:
        self.asked.append(self.headers.get("authorization"))
        self.answer(json.dumps(self.workers).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def prefect_like() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
        thread.join()


def test_the_doctor_tells_whether_a_worker_takes_runs(
    prefect_like: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat_core.cli.doctor_verb import service_lines

    monkeypatch.setenv("PREFECT_API_URL", prefect_like)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ada:secret")
    monkeypatch.delenv("PREFECT_API_KEY", raising=False)
    Server.workers = [{"status": "ONLINE"}, {"status": "OFFLINE"}]
    assert [(line.name, line.state) for line in service_lines(tmp_path)] == [
        ("Prefect", "ok"),
        ("worker", "ok"),
    ]
    assert Server.asked[-1] == "Basic YWRhOnNlY3JldA=="
    Server.workers = [{"status": "OFFLINE"}]
    assert [line.state for line in service_lines(tmp_path)] == ["ok", "warn"]
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    (line,) = service_lines(tmp_path)
    assert line.state == "warn" and "does not answer" in line.found
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "none"))
    (line,) = service_lines(tmp_path)
    assert line.state == "ok" and "not up" in line.found


@pytest.mark.slow
def test_the_doctor_of_this_machine_answers_in_lines_and_in_json(tmp_path: Path) -> None:
    done = at(["doctor", "tiny", "--base-dir", str(tmp_path), "--json"])
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["fit"] else 1)
    lines = {line["name"]: line for line in document["lines"]}
    assert {"torch", "speed", "memory", "disk", "writing", "clock", "Prefect"} <= set(lines)
    assert all(line["state"] == "ok" or line["remedy"] for line in lines.values())
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "locks"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_machine_that_cannot_carry_a_profile_ends_the_run_before_any_work(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    env = {"PREFECT_HOME": str(tmp_path / "prefect"), "NANOCHAT_OFFLINE": "1"}
    done = at(["run", "dgx-spark", "--base-dir", str(tmp_path / "base")], **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: this machine cannot carry dgx-spark: GPU: there is no NVIDIA driver" in done.stderr
    assert "nanochat doctor dgx-spark" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "base" / "assets").exists()
