"""The command as a user meets it: its words, its exit codes, never a traceback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import PROFILE, Command, Toy

P = str(PROFILE)
TORCHLESS = "import sys; sys.modules['torch'] = None; sys.modules['prefect'] = None\n"


def fails(done: "subprocess.CompletedProcess[str]", code: int, says: str) -> None:
    """One clear line, the code that belongs to it, and no traceback."""
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr


def test_help_answers_at_once() -> None:
    before = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-m", "nanochat_core.cli.main", "--help"], capture_output=True, text=True
    )
    took = os.times().children_user - before
    assert done.returncode == 0 and "nanochat run cpu-demo" in done.stdout
    assert took < 2  # of a processor; half a second on an idle machine
    heavy = ("torch", "prefect", "pydantic")
    code = f"import sys, nanochat_core.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "nope"], "there is no profile called 'nope'"),
        (["run", "nope.toml"], "there is no profile file nope.toml"),
        (["run", P, "--set", "pretran.depth=3"], "did you mean pretrain?"),
        (["run", P, "--set", "pretrain.deth=3"], "did you mean depth?"),
        (["run", P, "--set", "pretrain.depth=deep"], "pretrain.depth = 'deep'"),
        (["run", P, "--set", "pretrain"], "write it as stage.key=value"),
        (["run", P, "--set", "pretrain.depth=100"], "set it to at most 99"),
        (["run", P, "--rerun", "stf"], "did you mean sft?"),
        (["run", P, "--until", "nowhere"], "there is no stage called 'nowhere'"),
        (["stage", "stf", P], "did you mean sft?"),
        (["plan", P, "--set", "x.y=1"], "there is no stage called 'x'"),
        (["verify", "nope"], "there is no profile called 'nope'"),
        (["status"], "nanochat run cpu-demo"),
        (["status", "tiny"], "nanochat run tiny"),
        (["report"], "nanochat run cpu-demo"),
        (["chat"], "nothing has been trained in"),
        (["chat", "./nowhere"], "there is no directory ./nowhere"),
        (["serve", "sft"], "nothing has been trained in"),
    ],
)
def test_what_the_user_can_mend_is_one_line(here: Command, words: list[str], says: str) -> None:
    fails(here(*words), 2, says)


@pytest.mark.parametrize(
    "words", [["frobnicate"], ["run"], ["run", P, "--frobnicate"], ["serve", "--port", "x"]]
)
def test_a_misspelt_command_shows_how_it_is_used(here: Command, words: list[str]) -> None:
    done = here(*words)
    assert done.returncode == 2 and "Usage: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", [["run", P], ["stage", "shards", P]])
def test_a_base_directory_that_is_none_is_refused(here: Command, tmp_path: Path, verb: list[str]) -> None:
    (tmp_path / "file").write_text("")
    for path, says in [
        (tmp_path / "file", "it is not a directory"),
        (tmp_path / "file" / "below", "it is not a directory"),
        (Path("/proc/nanochat"), "nothing can be written there"),
    ]:
        fails(here(*verb, "--base-dir", str(path)), 2, says)


@pytest.mark.parametrize(
    ("options", "says"), [("ro", "nothing can be written there"), ("size=4k", "disk is full")]
)
def test_a_read_only_or_full_disk_is_refused_before_anything_is_written(
    here: Command, tmp_path: Path, options: str, says: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount")
    try:
        fails(here("run", P, "--base-dir", str(disk)), 2, says)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_taken_port_is_refused_before_a_model_is_loaded(here: Command, toy: Toy) -> None:
    toy.make(toy.plan(until="sft"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        fails(here("serve", "sft", "--port", port), 2, f"port {port} of 127.0.0.1 is taken")


def test_a_newer_artefact_is_refused(here: Command, toy: Toy) -> None:
    toy.make(toy.plan(until="shards"))
    (record,) = (toy.base_dir / "shards").glob("*/result.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 99}))
    for verb in ("run", "plan", "verify"):
        fails(here(verb, P), 2, "newer nanochat")


def test_one_stage_makes_what_it_reads_and_names_what_comes_next(here: Command, toy: Toy) -> None:
    done = here("stage", "mid", P)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines() if " done " in line] == [
        "shards",
        "pretrain",
        "mid",
    ]
    done_line, next_line = done.stdout.splitlines()
    assert (Path(done_line.removeprefix("done: ")) / "model.safetensors").exists()
    assert next_line == f"next: nanochat run {P}"
    again = here("stage", "mid", P)
    assert again.stderr == "cached     mid\n" and again.stdout == done.stdout
    assert {p.name for p in toy.base_dir.iterdir()} >= {"shards", "pretrain", "mid", "locks", "runs"}
    assert not (toy.base_dir / "base_loss").exists()
    status = here("status")
    states = {line.split()[0]: line.split()[1] for line in status.stdout.splitlines()[1:-1]}
    assert states == {"shards": "done", "pretrain": "done", "base_loss": "waiting", "mid": "done"}
    assert "nanochat run" in status.stdout.splitlines()[-1]


def test_one_stage_needs_neither_prefect_nor_torch(tmp_path: Path) -> None:
    code = (
        TORCHLESS
        + f"sys.argv = ['nanochat', 'stage', 'pretrain', {P!r}]\n"
        + "from nanochat_core.cli.main import main; main()"
    )
    env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_a_stage_of_ones_own_is_named_on_the_command_line(
    here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from nanochat_core.artifacts.stage import Recipe as Config\n"
        "ROW = {'reads': {'text': 'shards'}, 'trains': 'mine'}\n"
        "def run(cfg, job):\n    return {'documents': 3}\n"
    )
    own = ["--stage", "mine.py:mine"]
    done = here("stage", "mine", P, *own)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"next: nanochat run {P} --stage {tmp_path}/mine.py:mine"
    assert here("stage", "mine", P, *own).stderr == "cached     mine\n"
    assert re.search("^mine +done", here("status").stdout, re.M)
    assert re.search("^mine +ok$", here("verify", P, *own).stdout, re.M)
    fails(here("plan", P, "--stage", "none.py:x"), 2, "none.py cannot be read")


def test_a_stage_that_fails_leaves_one_line_its_log_and_the_way_on(here: Command, toy: Toy) -> None:
    toy.make(toy.plan(until="shards"))
    done = here("stage", "pretrain", P, "--set", "pretrain.fail_at=3")
    fails(done, 1, "error: pretrain failed: the loss is not finite at step 3")
    assert "log.txt" in done.stderr
    assert f"nanochat stage pretrain {P} --set pretrain.fail_at=3" in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(here: Command, toy: Toy, signum: signal.Signals) -> None:
    toy.make(toy.plan(until="shards"))
    slow = ["stage", "pretrain", P, "--set", "pretrain.steps=500", "--set", "pretrain.pause=0.02"]
    with subprocess.Popen(
        [sys.executable, "-m", "nanochat_core.cli.main", *slow],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 20
        while not list(toy.base_dir.glob("pretrain/*/checkpoints/step_*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signum)  # as a terminal does: to the whole foreground group
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "To go on: nanochat stage pretrain" in said and "Traceback" not in said
    status = here("status", "--json")
    found = json.loads(status.stdout)["stages"]["pretrain"]
    assert found["state"] == "interrupted" and re.search(r"step \d+", found["note"])


def test_plan_tells_each_stage_its_reason_and_its_cost(here: Command, toy: Toy) -> None:
    toy.make(toy.plan(until="sft_eval"))
    done = here("plan", P, "--set", "sft.steps=9", "--json")
    stages = json.loads(done.stdout)["stages"]
    assert stages["mid"]["state"] == "hit" and stages["mid"]["disk"] > 0
    assert stages["sft"]["state"] == "run" and stages["sft"]["why"] == "sft.steps: 5 -> 9"
    assert stages["sft"]["seconds"] is not None and stages["sft"]["flops"] == 9e6
    table = here("plan", P, "--set", "sft.steps=9").stdout
    assert "sft.steps: 5 -> 9" in table
    assert table.splitlines()[-1] == f"next: nanochat run {P} --set sft.steps=9"


def test_verify_finds_a_flipped_bit_and_names_the_way_to_mend_it(here: Command, toy: Toy) -> None:
    toy.make(toy.plan(until="mid"))
    assert here("verify", P).returncode == 0
    (weights,) = (toy.base_dir / "pretrain").glob("*/model.safetensors")
    weights.write_text("0" + weights.read_text()[1:])
    done = here("verify", P)
    assert done.returncode == 1 and "its hash is another" in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: nanochat verify {P} --discard"
    here("verify", P, "--discard")
    stages = json.loads(here("plan", P, "--until", "mid", "--json").stdout)["stages"]
    assert {name: stage["state"] for name, stage in stages.items() if stage["state"] != "hit"} == {
        "pretrain": "run",
    }


def test_hours_of_finished_work_are_not_thrown_away_without_a_word(here: Command, toy: Toy) -> None:
    toy.make(toy.plan(until="mid"))
    (record,) = (toy.base_dir / "mid").glob("*/result.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": 220_000.0}))
    changed = ["stage", "mid", P, "--set", "mid.depth=3"]
    done = here(*changed)
    fails(done, 2, "say --yes if it is meant")
    assert "mid runs again: mid.depth: 2 -> 3; 2.5 days of work stay in" in done.stderr
    assert here(*changed, "--yes").returncode == 0


def test_gc_deletes_what_no_latest_run_uses_and_nothing_else(here: Command, toy: Toy) -> None:
    for steps in ("3", "4", "5"):
        toy.make(toy.plan(f"pretrain.steps={steps}", until="pretrain"))
    base = toy.base_dir
    latest = json.loads((base / "runs" / "latest.json").read_text())["jobs"]
    (base / "pretrain" / f"{latest['pretrain']}.rerun").mkdir()
    assert here("gc", "--keep", "0", "--dry-run").stdout.count("/pretrain/") == 3
    assert len(list((base / "pretrain").iterdir())) == 4
    assert here("gc", "--keep", "1").returncode == 0
    assert len(list((base / "pretrain").iterdir())) == 2
    here("gc", "--keep", "0")
    assert [path.name for path in (base / "pretrain").iterdir()] == [latest["pretrain"]]
    assert [path.name for path in (base / "shards").iterdir()] == [latest["shards"]]
