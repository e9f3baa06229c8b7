"""`nanochat run` as a whole, with the server it brings along."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from toys import PROFILE, Command

P = str(PROFILE)


@pytest.fixture
def env(prefect_home: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(prefect_home),
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "PREFECT_API_URL": "",
    }


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def leftovers(base: Path) -> list[list[str]]:
    """Living processes of ours: stages, servers, commands."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NANOCHAT_BASE_DIR") == str(base) and process.status() != "zombie":
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def test_one_command_does_everything_and_the_next_one_nothing(
    nanochat: Command, env: dict[str, str], tmp_path: Path
) -> None:
    done = nanochat("run", P, env=env)
    assert done.returncode == 0, done.stderr
    rows = ["shards", "pretrain", "base_loss", "mid", "sft", "sft_eval", "report"]
    lines = [line.split() for line in done.stderr.splitlines()]
    assert [words[0] for words in lines if words[1] == "starts:"] == rows
    assert [words[0] for words in lines if words[1] == "done"] == rows
    assert len(lines) == 2 * len(rows), done.stderr  # and nothing else: Prefect is quiet
    last = done.stdout.splitlines()[-1]
    assert last.startswith("report: ") and Path(last.removeprefix("report: ")).is_file()
    server = tmp_path / "base" / "prefect" / "server.log"
    started = server.stat().st_mtime_ns
    again = nanochat("run", P, env=env)
    assert again.stderr == f"cached     {', '.join(rows)}\n" and again.stdout == done.stdout
    assert server.stat().st_mtime_ns == started  # no server for nothing
    assert leftovers(tmp_path / "base") == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "kill -9"])
def test_an_interrupted_run_leaves_nobody_behind_and_goes_on(
    nanochat: Command, env: dict[str, str], tmp_path: Path, how: str
) -> None:
    base = tmp_path / "base"
    slow = ["run", P, "--set", "pretrain.steps=150", "--set", "pretrain.pause=0.04", "--until", "pretrain"]
    with subprocess.Popen(
        [sys.executable, "-m", "nanochat_core.cli.main", *slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
        start_new_session=True,
    ) as process:
        until(lambda: list(base.glob("pretrain/*/checkpoints/step_*")))
        os.killpg(process.pid, signal.SIGINT if how == "ctrl-c" else signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    if how == "ctrl-c":
        assert process.returncode == 130, said
        assert said.splitlines()[-1].startswith("interrupted; what was done is kept. To go on: nanochat run ")
        assert "Traceback" not in said and "Error" not in said
    until(lambda: leftovers(base) == [])
    done = nanochat(*slow, env=env)
    assert done.returncode == 0, done.stderr
    (notes,) = (base / "starts").glob("pretrain-*")
    first, second = map(int, notes.read_text().split())
    assert first == 0 and second > 0
    attempts = next(base.glob("pretrain/*/attempts.jsonl")).read_text().splitlines()
    assert [json.loads(line)["event"] for line in attempts][-1] == "finished"


def test_a_server_that_does_not_answer_is_one_line(here: Command) -> None:
    done = here("run", P, env={"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the Prefect server at http://127.0.0.1:9/api does not answer")
