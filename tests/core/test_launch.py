import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import PROFILE, Toy

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Interrupted
from nanochat_core.runner import launch as launching
from nanochat_core.runner import plan
from nanochat_core.runner.launch import StageFailed, launch, pending

SLOW = ("pretrain.steps=30", "pretrain.pause=0.03")
FIRST_OF_ALL = ("shards", "pretrain")


def weights(made: plan.Plan, name: str) -> str:
    return (made.jobs[name].path / "model.safetensors").read_text()


@pytest.fixture
def undisturbed(tmp_path: Path, toy: Toy) -> str:
    """The weights that the slow recipe comes to when nobody interferes."""
    other = Toy(tmp_path / "other")
    made = other.plan("pretrain.steps=30", until="pretrain")
    other.make(made)
    return weights(made, "pretrain")


def background(made: plan.Plan, base_dir: Path, *overrides: str) -> "subprocess.Popen[bytes]":
    """A process that runs pretrain, as a user's command would."""
    script = (
        "import sys; from pathlib import Path; from nanochat_core.runner import launch, plan\n"
        f"made = plan.load({str(PROFILE)!r}, {list(overrides)!r}, base_dir=Path({str(base_dir)!r}))\n"
        "launch.launch(made, 'pretrain')"
    )
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


def started(directory: Path) -> int | None:
    """The process of the latest attempt in a directory, once it has saved something."""
    attempts = store.read_attempts(directory)
    saved = plan.saved_step(directory)
    return int(attempts[-1]["pid"]) if attempts and saved is not None and saved > 3 else None


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_stage_runs_in_a_process_of_its_own_and_is_done(toy: Toy) -> None:
    made = toy.plan()
    launch(made, "shards")
    rows: list[dict[str, Any]] = []
    metrics = launch(made, "pretrain", rows.append)
    job = made.jobs["pretrain"]
    assert metrics["val_bpb"] == 1.5
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"job.json", "result.json", "log.txt", "metrics.jsonl"} <= {
        path.name for path in job.path.iterdir()
    }
    assert int(store.read_attempts(job.path)[0]["pid"]) != os.getpid()
    record = json.loads((job.path / "job.json").read_text())
    assert record["config"]["steps"] == 6 and record["inputs"]["text"]["stage"] == "shards"
    assert record["provenance"]["versions"]["torch"]


def test_a_finished_stage_is_not_run_again(toy: Toy) -> None:
    made = toy.plan(until="pretrain")
    assert all(pending(made, name) for name in FIRST_OF_ALL)
    assert toy.run(made) == ["shards", "pretrain"]
    assert not any(pending(made, name) for name in FIRST_OF_ALL)
    assert toy.run(made) == []
    assert toy.starts(made, "pretrain") == ["0"]


def test_a_failure_ends_in_its_own_words_and_goes_on_from_the_checkpoint(toy: Toy) -> None:
    made = toy.plan("pretrain.fail_at=4")
    toy.make(made, "shards")
    with pytest.raises(StageFailed, match="pretrain failed: the loss is not finite at step 4") as failure:
        launch(made, "pretrain")
    assert "not finite" in failure.value.log.read_text()
    assert not (made.jobs["pretrain"].path / "result.json").exists()
    with pytest.raises(StageFailed):
        launch(made, "pretrain")
    assert toy.starts(made, "pretrain") == ["0", "4"]


def test_a_stage_whose_input_is_missing_says_which(toy: Toy) -> None:
    with pytest.raises(launching.InputLost, match="pretrain reads shards, which is not finished"):
        launch(toy.plan(), "pretrain")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_stage_goes_on_and_ends_in_the_same_bytes(
    toy: Toy, undisturbed: str, signum: signal.Signals
) -> None:
    made = toy.plan(*SLOW)
    toy.make(made, "shards")
    job = made.jobs["pretrain"]

    def kill() -> None:
        os.kill(until(lambda: started(job.path)), signum)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(Interrupted if signum == signal.SIGTERM else StageFailed):
        launch(made, "pretrain")
    thread.join()
    launch(made, "pretrain")
    first, second = map(int, toy.starts(made, "pretrain"))
    assert first == 0 and second >= 4
    assert weights(made, "pretrain") == undisturbed


def test_a_stage_that_is_asked_to_stop_saves_and_ends(toy: Toy) -> None:
    made = toy.plan(*SLOW)
    toy.make(made, "shards")
    job = made.jobs["pretrain"]
    with pytest.raises(Interrupted):
        launch(made, "pretrain", stopping=lambda: started(job.path) is not None)
    assert store.read_attempts(job.path)[-1]["why"] == "interrupted"
    assert plan.explain(made)["pretrain"].state == "resume"


def test_a_stage_does_not_outlive_a_parent_that_is_killed(toy: Toy, undisturbed: str) -> None:
    made = toy.plan(*SLOW)
    toy.make(made, "shards")
    job = made.jobs["pretrain"]
    parent = background(made, toy.base_dir, *SLOW)
    child = until(lambda: started(job.path))
    parent.kill()
    parent.wait()
    until(lambda: not alive(child))
    launch(made, "pretrain")
    assert weights(made, "pretrain") == undisturbed


def test_two_at_once_write_a_directory_once(toy: Toy, undisturbed: str) -> None:
    made = toy.plan(*SLOW)
    toy.make(made, "shards")
    job = made.jobs["pretrain"]
    other = background(made, toy.base_dir, *SLOW)
    first = until(lambda: started(job.path))
    os.kill(first, signal.SIGSTOP)  # so that the second has time to start

    def go_on() -> None:
        try:
            until(lambda: "waiting for it" in (job.path / "log.txt").read_text(), 60)
        finally:
            os.kill(first, signal.SIGCONT)

    thread = threading.Thread(target=go_on)
    thread.start()
    launch(made, "pretrain")
    thread.join()
    assert other.wait(60) == 0
    assert toy.starts(made, "pretrain") == ["0"]
    assert weights(made, "pretrain") == undisturbed
    assert "waiting for it" in (job.path / "log.txt").read_text()


def test_the_second_goes_on_where_the_first_was_killed(toy: Toy, undisturbed: str) -> None:
    made = toy.plan(*SLOW)
    toy.make(made, "shards")
    job = made.jobs["pretrain"]
    other = background(made, toy.base_dir, *SLOW)
    first = until(lambda: started(job.path))
    threading.Timer(0.3, lambda: os.kill(first, signal.SIGKILL)).start()
    launch(made, "pretrain")
    other.wait(20)
    assert len(toy.starts(made, "pretrain")) == 2
    assert weights(made, "pretrain") == undisturbed


def test_the_device_is_used_by_one_stage_at_a_time(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made, "shards")
    with store.locked(toy.base_dir / "locks" / "device.lock"):
        thread = threading.Thread(target=lambda: launch(made, "pretrain"))
        thread.start()
        time.sleep(0.5)
        assert toy.starts(made, "pretrain") == []
    thread.join(20)
    assert toy.starts(made, "pretrain") == ["0"]


def test_a_stage_that_says_nothing_for_long_is_ended_and_goes_on(toy: Toy) -> None:
    made = toy.plan("pretrain.steps=1", "pretrain.pause=1.5", "runtime.silent_minutes=0.015")
    toy.make(made, "shards")
    with pytest.raises(launching.StageKilled, match=r"said nothing for 0\.015 minutes.*silent_minutes"):
        launch(made, "pretrain")
    assert store.read_attempts(made.jobs["pretrain"].path)[-1]["event"] == "stopped"
    patient = toy.plan("pretrain.steps=1", "pretrain.pause=1.5", "runtime.silent_minutes=0")
    assert patient.jobs["pretrain"].path == made.jobs["pretrain"].path
    launch(patient, "pretrain")


def test_a_rerun_keeps_the_old_artefact_until_the_new_one_is_complete(toy: Toy) -> None:
    made = toy.plan(*SLOW)
    toy.make(made)
    job = made.jobs["pretrain"]
    again = toy.plan(*SLOW, rerun=["pretrain"])
    old = (job.path / "result.json").read_text()
    with pytest.raises(Interrupted):
        launch(again, "pretrain", rerun="first", stopping=lambda: started(plan.rerun_path(job)) is not None)
    assert (job.path / "result.json").read_text() == old
    assert plan.explain(made)["pretrain"].state == "hit"
    launch(again, "pretrain", rerun="first")
    assert (job.path / "result.json").read_text() != old
    assert not plan.rerun_path(job).exists()
    assert int(toy.starts(made, "pretrain")[-1]) > 0  # the second attempt went on from the first's checkpoint


def test_the_same_request_to_rerun_makes_a_stage_once(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    again = toy.plan(rerun=["sft_eval"])
    assert toy.run(again, rerun="request-1") == ["sft_eval", "report"]
    assert toy.run(again, rerun="request-1") == []
    assert toy.run(again, rerun="request-2") == ["sft_eval", "report"]
    assert len(toy.starts(made, "pretrain")) == 1


def test_a_rerun_that_was_complete_but_not_in_place_is_put_there(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    job, again = made.jobs["mid"], toy.plan(rerun=["mid"])
    job.path.rename(plan.rerun_path(job))  # as a power cut between two renames leaves it
    launch(again, "mid", rerun="request")
    assert store.verify(job.path, toy.base_dir) is not None
    assert not plan.rerun_path(job).exists()
    assert toy.starts(made, "mid") == ["0"]


def test_a_full_disk_is_one_clear_line_and_the_way_on(toy: Toy, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        made = Toy(small).plan("pretrain.steps=200")
        toy.make(made, "shards")
        with pytest.raises(StageFailed, match="the disk is full; free some space and run the same command"):
            launch(made, "pretrain")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_torn_line_of_progress_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = launching.follow(path)
    assert next(rows) is None
    path.write_text('{"step": 1}\nnot json\n{"step": 2')
    assert next(rows) == {"step": 1}
    assert next(rows) is None
    with path.open("a") as f:
        f.write("0}\n")
    assert next(rows) == {"step": 20}
    assert next(rows) is None
    path.write_text('{"step": 5}\n')  # a resumed stage cut it back
    assert next(rows) is None
    with path.open("a") as f:
        f.write('{"step": 6}\n')
    assert next(rows) == {"step": 6}


def test_a_full_disk_is_known_by_its_number_or_its_words_however_deep() -> None:
    import errno

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = RuntimeError("the checkpoint could not be written")
    wrapped.__cause__ = full
    said = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert all(launching.out_of_space(error) for error in (full, wrapped, said))
    assert not launching.out_of_space(ValueError("the loss is not finite"))
