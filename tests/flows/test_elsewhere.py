"""`nanochat mirror` and `nanochat join` as a user meets them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from toys import PROFILE, Command, Toy

P = str(PROFILE)


def test_what_one_machine_sends_another_plans_to_fetch(toy: Toy, here: Command, tmp_path: Path) -> None:
    toy.make(toy.plan())
    url = f"file://{tmp_path}/mirror"
    sent = here("mirror", P, "--to", url)
    assert sent.returncode == 0, sent.stderr
    assert [line.split() for line in sent.stdout.splitlines()][1] == ["shards", "finished", "sent"]
    assert f"runtime.mirror={url}" in sent.stdout.splitlines()[-1]
    again = here("mirror", P, "--to", url)
    assert "was there" in again.stdout and " sent" not in again.stdout
    there = {"NANOCHAT_BASE_DIR": str(tmp_path / "there"), "NANOCHAT_MIRROR": url}
    planned = here("plan", P, env=there)
    rows = {words[0]: words[1:] for line in planned.stdout.splitlines() if len(words := line.split()) > 1}
    assert rows["pretrain"][0] == "fetch" and planned.stdout.count("finished in the mirror") == 7
    done = here("stage", "pretrain", P, env=there)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "there" / "starts").exists()  # nothing was trained there


def test_a_stage_run_by_hand_leaves_its_copy(here: Command, tmp_path: Path) -> None:
    done = here("stage", "shards", P, env={"NANOCHAT_MIRROR": f"file://{tmp_path}/mirror"})
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "mirror" / "shards").glob("*/result.json"))) == 1
    assert (tmp_path / "mirror" / "downloads" / "words.txt").is_file()


def test_a_mirror_has_to_be_named_and_written(here: Command, tmp_path: Path, toy: Toy) -> None:
    toy.make(toy.plan(until="shards"))
    unnamed = here("mirror", P)
    assert unnamed.returncode == 2 and "there is no mirror: name one" in unnamed.stderr
    (tmp_path / "taken").write_text("")
    away = here("mirror", P, "--to", f"file://{tmp_path}/taken/mirror")
    assert away.returncode == 1 and "cannot be written" in away.stderr and "it lacks shards" in away.stderr
    assert "Traceback" not in away.stderr


def test_with_nothing_made_here_there_is_nothing_to_send(here: Command, tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/mirror", "s3://bucket/prefix"):
        done = here("mirror", P, "--to", url)
        assert done.returncode == 2 and done.stdout == ""
        assert "nothing of this run is in" in done.stderr and "so nothing was sent" in done.stderr
    assert not (tmp_path / "mirror").exists()


def test_a_bucket_that_does_not_answer_is_one_sentence(here: Command, toy: Toy) -> None:
    toy.make(toy.plan(until="shards"))
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    away = keys | {"FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:9"}  # nobody listens there
    done = here("mirror", P, "--to", "s3://bucket/prefix", env=away)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "s3://bucket/prefix cannot be written" in done.stderr and "it lacks shards" in done.stderr


def test_what_is_damaged_here_is_not_sent_and_that_is_said(here: Command, tmp_path: Path, toy: Toy) -> None:
    made = toy.plan(until="shards")
    toy.make(made)
    (made.jobs["shards"].path / "shards.json").write_text("[]")
    done = here("mirror", P, "--to", f"file://{tmp_path}/mirror")
    assert done.returncode == 1 and "damaged here, so not sent" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("next: nanochat verify")


def test_joining_waits_for_a_call_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanochat_core.cli.main", "join", "--base-dir", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "waiting for a stage to be called" in process.stderr.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "nanochat join --base-dir" in process.stderr.read()
