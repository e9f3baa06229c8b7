"""Text of one's own: the flow, the verbs, and a profile that trains on what they made."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from toys import Command

import nanochat_core
from nanochat_core.sources.documents import shard_list

TINY = Path(nanochat_core.__file__).parent / "profiles" / "tiny.toml"


def text(folder: Path, documents: int) -> Path:
    folder.mkdir()
    lines = (
        json.dumps({"body": f"{i} little words of mine that say {i * i} " * 8}) for i in range(documents)
    )
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder


def nanochat(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nanochat_core.cli.main", *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_fills_a_folder_in_two_tasks_and_adds_nothing_the_second_time(tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    from flows.repackage_flow import repackage

    mine, out = text(tmp_path / "mine", 300), tmp_path / "out"
    state = repackage(str(mine), str(out), column="body", shard_chars=40_000, return_state=True)
    made = state.result()
    assert made["documents"] + made["validation_documents"] == 300 and made["train_shards"] == 3
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert repackage(str(mine), str(out), column="body", shard_chars=40_000) == made
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + 20  # task runs reach the server a moment later
        while time.monotonic() < deadline:
            tasks = client.read_task_runs()
            ours = [run for run in tasks if run.flow_run_id == state.state_details.flow_run_id]
            if len(ours) == 2 and all(run.state_name == "Completed" for run in ours):
                break
            time.sleep(0.1)
    assert sorted(run.name.rpartition("-")[0] for run in ours) == ["sort", "write"]
    with pytest.raises(ValueError, match="expected an object with a string field 'text'"):
        repackage(str(mine), str(tmp_path / "other"))


@pytest.mark.slow
def test_a_profile_trains_on_what_repackage_made(tmp_path: Path) -> None:
    mine, out, base = text(tmp_path / "mine", 4000), tmp_path / "out", tmp_path / "base"
    done = nanochat("repackage", str(mine), str(out), "--column", "body", "--shard-chars", "200000",
                    "--base-dir", str(base))  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, following = done.stdout.splitlines()
    assert first.startswith("done: 3,") and f"for validation, in {out}" in first
    assert following == (
        f"next: nanochat run PROFILE --set shards_head.source={out} --set shards.source={out}"
    )
    profile = tmp_path / "mine.toml"
    profile.write_text(TINY.read_text().replace("max_chars = 400_000\n", ""))
    sets = following.removeprefix("next: nanochat run PROFILE ").split()
    done = nanochat("stage", "pretrain", str(profile), *sets, "--base-dir", str(base))
    assert done.returncode == 0, done.stderr
    (listed,) = (shard_list(path.parent) for path in base.glob("shards/*/shards.json"))
    assert [shard.path.parent for shard in listed.train + listed.validation] == [out] * 5
    (result,) = base.glob("pretrain/*/result.json")
    assert 0 < json.loads(result.read_text())["metrics"]["val_bpb"] < 8

    os.utime(listed.train[0].path)  # a touch is no change
    assert (
        "cached     pretrain"
        in nanochat("stage", "pretrain", str(profile), *sets, "--base-dir", str(base)).stderr
    )
    listed.train[0].path.write_bytes(listed.train[1].path.read_bytes())
    plan = nanochat("plan", str(profile), *sets, "--base-dir", str(base), "--json")
    stages = json.loads(plan.stdout)["stages"]
    assert stages["shards"]["state"] == "run" and "has changed" in stages["shards"]["why"]


@pytest.mark.slow
def test_an_interrupted_repackage_goes_on(tmp_path: Path) -> None:
    mine, out, base = text(tmp_path / "mine", 8_000), tmp_path / "out", tmp_path / "base"
    words = ["repackage", str(mine), str(out), "--column", "body", "--shard-chars", "100000"]
    words += ["--base-dir", str(base)]
    with subprocess.Popen(
        [sys.executable, "-m", "nanochat_core.cli.main", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(out.rglob("run_*.arrow")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "To go on: the same command" in said and "Traceback" not in said
    runs = len(list(out.rglob("run_*.arrow")))
    done = nanochat(*words)
    assert done.returncode == 0 and runs > 0, done.stderr


def test_identity_says_how_far_it_is_and_what_comes_next(command: Command, tmp_path: Path) -> None:
    asked: list[str | None] = []

    class Writer(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.headers["Authorization"])
            turns = [("user", f"who are you, {len(asked)}?"), ("assistant", "I am Ada.")]
            said = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
            body = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Writer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    out, persona = tmp_path / "ada.jsonl", tmp_path / "ada.txt"
    persona.write_text("{name} lives on a boat.")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    words = ["identity", str(out), "--base-url", url, "--model", "m", "--name", "Ada", "--count", "12"]
    try:
        done = command(*words, "--persona", str(persona), env={"NANOCHAT_API_KEY": "secret"})
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["10 of 12 conversations", "12 of 12 conversations"]
    assert done.stdout.splitlines() == [
        f"done: 12 new conversations in {out}",
        f"next: nanochat run PROFILE --set assets.identity={out}",
    ]
    assert set(asked) == {"Bearer secret"} and "secret" not in done.stdout + done.stderr + out.read_text()


def test_what_the_user_can_mend_is_one_line(command: Command, tmp_path: Path) -> None:
    endpoint = ["--base-url", "127.0.0.1:1", "--model", "m"]
    done = command("identity", str(tmp_path / "x.jsonl"), *endpoint)
    assert (done.returncode, done.stderr) == (
        2,
        "error: 127.0.0.1:1 is no address: write it as http://HOST:PORT/v1\n",
    )
    done = command("identity", str(tmp_path / "x.jsonl"), *endpoint, "--persona", "nowhere.txt")
    assert done.returncode == 2 and "there is no file nowhere.txt" in done.stderr
    assert not (tmp_path / "x.jsonl").exists()
