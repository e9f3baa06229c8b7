import contextlib
import io
import os
import pty
import re
from pathlib import Path

import pytest
from toys import Toy

from nanochat_core.artifacts.progress import Pace, count, describe, is_progress, span
from nanochat_core.report.headline import headline
from nanochat_core.runner import estimate, status
from nanochat_core.runner.plan import explain
from nanochat_core.runner.run_display import RunDisplay


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1:00 min"),
        (200, "3:20 min"),
        (18_240, "5:04 h"),
        (803_520, "9.3 days"),
    ],
)
def test_time_is_told_as_people_say_it(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_large_numbers_are_short() -> None:
    assert [count(n) for n in (0, 950, 12_400, 73.5e6, 1.9e12)] == ["0", "950", "12.4 k", "73.5 M", "1.9 T"]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"reward_start": 0.76, "reward": 0.87, "val_bpb": 1.0}, "reward 0.760 -> 0.870"),
        ({"chatcore": 0.31, "spelling": 0.9}, "ChatCORE 0.310"),
        ({"val_bpb_start": 3.2, "val_bpb": 1.53}, "3.200 -> 1.530 bits/byte"),
        ({"documents": 12000}, "12,000 documents"),
        ({}, ""),
    ],
)
def test_a_stage_is_known_by_its_one_number(metrics: dict[str, float], words: str) -> None:
    assert headline(dict(metrics)) == words


def test_the_time_left_follows_the_pace_and_a_step_back() -> None:
    pace = Pace()
    assert pace.see({"step": 10, "steps": 100, "time": 50.0}) is None
    assert pace.see({"step": 20, "steps": 100, "time": 60.0}) == 80.0
    assert pace.see({"step": 15, "steps": 100, "time": 61.0}) is None
    assert pace.see({"step": 16, "steps": 100, "time": 63.0}) == 168.0


def test_a_row_in_words() -> None:
    row = {"step": 120, "steps": 400, "loss": 4.2123, "tokens_per_s": 8100.0, "time": 1.0}
    assert describe(row, 200.0) == "120/400  30%  loss 4.212  8.1 k tok/s  3:20 min left"


@pytest.mark.parametrize(
    "row", [{}, {"step": 1}, {"step": "1", "steps": 2, "time": 0}, {"step": 1, "steps": 0, "time": 0}]
)
def test_a_foreign_row_is_not_progress(row: dict[str, object]) -> None:
    assert not is_progress(row)


def test_without_a_terminal_a_stage_is_two_lines_and_the_cached_ones_one() -> None:
    out = io.StringIO()
    terminal = RunDisplay(out)
    terminal.found("shards")
    terminal.found("tokenizer")
    with terminal.stage("pretrain", "first run", lambda: {"val_bpb": 1.5}) as see:
        see({"step": 1, "steps": 2, "time": 0.0})
    assert re.fullmatch(
        r"cached     shards, tokenizer\n"
        r"pretrain +starts: first run\n"
        r"pretrain +done in 0\.\d s  1\.500 bits/byte\n",
        out.getvalue(),
    )


def test_at_a_terminal_there_is_a_bar_with_loss_and_time_left() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as out:
        terminal = RunDisplay(out)
        with terminal.stage("pretrain", "first run", lambda: {"val_bpb": 1.5}) as see:
            see({"step": 1, "steps": 4, "loss": 5.0, "time": 0.0})
            see({"step": 2, "steps": 4, "loss": 4.5, "time": 30.0})
    read = b""
    with contextlib.suppress(OSError):  # what a terminal says when all has been read and nobody holds it
        while more := os.read(master, 100_000):
            read += more
    os.close(master)
    shown = read.decode()
    assert "2/4  50%  loss 4.500  1:00 min left" in shown
    assert re.search(r"pretrain +done in", shown) and "starts:" not in shown


def test_a_stage_that_ends_badly_is_not_called_done() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError), RunDisplay(out).stage("mid", "first run", dict):
        raise ValueError
    assert "done" not in out.getvalue()


def test_status_reads_the_disk(toy: Toy) -> None:
    made = toy.plan("pretrain.steps=9")
    toy.make(toy.plan(until="shards"))
    job = made.jobs["pretrain"]
    (job.path / "checkpoints" / "step_00000004").mkdir(parents=True)
    (job.path / "metrics.jsonl").write_text('{"step": 4, "steps": 9, "loss": 3.5, "time": 1.0}\n')
    jobs = {name: job.fingerprint for name, job in made.jobs.items()}
    found = {s.stage: s for s in status.standings(toy.base_dir, jobs)}
    assert (found["shards"].state, found["mid"].state) == ("done", "waiting")
    assert found["pretrain"].state == "interrupted" and found["pretrain"].note == "a checkpoint at step 4"
    lock = status.lock_path(toy.base_dir, "pretrain", job.fingerprint)
    with status.store.locked(lock):
        assert status.standing(toy.base_dir, "pretrain", job.fingerprint).state == "running"


def test_a_model_is_found_by_stage_by_directory_and_by_default(toy: Toy, tmp_path: Path) -> None:
    made = toy.plan(until="sft")
    toy.make(made)
    assert status.find_model(toy.base_dir, "mid") == made.jobs["mid"].path
    assert status.find_model(toy.base_dir, None) == made.jobs["sft"].path
    assert status.find_model(toy.base_dir, str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="shards leaves no model to talk to; these do: sft, mid, pretrain"):
        status.find_model(toy.base_dir, "shards")
    (made.jobs["sft"].path / "result.json").unlink()
    assert status.find_model(toy.base_dir, None) == made.jobs["mid"].path
    with pytest.raises(ValueError, match="sft of the latest run is not finished"):
        status.find_model(toy.base_dir, "sft")


def test_a_forecast_scales_what_was_measured_and_knows_what_it_does_not(toy: Toy) -> None:
    fresh = toy.plan()
    before, _ = estimate.forecast(fresh, explain(fresh))
    assert before["pretrain"].seconds is not None and before["base_loss"].seconds is None
    toy.make(fresh)
    changed = toy.plan("mid.steps=50")
    after, rate = estimate.forecast(changed, explain(changed))
    assert "FLOP/s" in rate
    assert after["pretrain"].seconds is None and after["pretrain"].disk
    assert after["mid"].seconds is not None and after["sft"].seconds is not None


def test_that_the_network_is_waited_for_is_told_once_a_wait_and_stands_in_the_line() -> None:
    out = io.StringIO()
    row = {"step": 3, "steps": 80, "time": 0.0}
    waiting = row | {"waiting": "waiting for the network: hub, no route; next try in 30 s"}
    with RunDisplay(out).bringing("shards") as see:
        for each in (row, waiting, waiting, row, waiting):
            see(each)
    lines = out.getvalue().splitlines()
    assert (
        lines == [f"shards         {waiting['waiting']}; Ctrl-C loses nothing, the same command goes on"] * 2
    )
    assert describe(waiting, None) == f"3/80  4%  {waiting['waiting']}"


def test_a_note_of_a_stage_is_told_where_nobody_watches_a_bar() -> None:
    out = io.StringIO()
    with RunDisplay(out).stage("shards", "first run", dict) as see:
        see({"step": 0, "steps": 1, "time": 0.0, "note": "a wheel is not installed"})
    assert "shards         note: a wheel is not installed\n" in out.getvalue()
