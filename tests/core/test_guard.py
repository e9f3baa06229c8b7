"""Before memory runs out the stage at work saves and ends, and goes on with fewer rows at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import Toy

from nanochat_core.artifacts import store
from nanochat_core.machine import guard
from nanochat_core.machine.hardware import Memory
from nanochat_core.runner import launch

GB = 10**9


def test_the_spark_stops_earlier_than_a_machine_whose_gpu_has_its_own_memory() -> None:
    def verdict(available: float, bounds: guard.MemoryLimits) -> str:
        return guard.look(lambda: Memory(120 * GB, round(available * GB), 0), bounds)

    assert [verdict(free, guard.SHARED) for free in (30, 16, 14, 5, 4)] == ["", "", "stop", "stop", "kill"]
    assert [verdict(free, guard.OWN) for free in (16, 5, 4, 1)] == ["", "", "stop", "kill"]
    assert guard.look(lambda: None, guard.SHARED) == ""  # where the kernel does not say, nothing is stopped


def test_a_stage_short_of_memory_saves_and_goes_on_with_half_the_rows(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toy.plan("pretrain.steps=40", "pretrain.pause=0.02", "runtime.device_batch.pretrain=16")
    folder = made.jobs["pretrain"].path / "checkpoints"
    told: list[str] = []

    def look() -> str:
        """Short once, when some steps are saved."""
        if not told and len(list(folder.glob("step_*"))) > 5:
            told.append("stop")
            return "stop"
        return ""

    launch.launch(made, "shards")
    monkeypatch.setattr(guard, "look", look)
    monkeypatch.setattr(guard, "await_memory", lambda **_: None)
    launch.insist(made, "pretrain")
    first, second = toy.starts(made, "pretrain")
    assert first == "0" and int(second) > 5
    job = json.loads((made.jobs["pretrain"].path / "job.json").read_text())
    assert job["runtime"]["device_batch"] == {"pretrain": 8}
    events = [event["event"] for event in store.read_attempts(made.jobs["pretrain"].path)]
    assert events == ["started", "stopped", "short_of_memory", "started", "finished"]
    straight = toy.plan("pretrain.steps=40", "pretrain.pause=0.02").jobs["pretrain"]
    assert straight.fingerprint == made.jobs["pretrain"].fingerprint  # the device batch is no recipe


def test_memory_that_never_comes_back_ends_the_stage_with_what_to_do(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toy.plan("pretrain.steps=400", "pretrain.pause=0.05")
    launch.launch(made, "shards")
    monkeypatch.setattr(guard, "look", lambda: "stop")
    monkeypatch.setattr(guard, "await_memory", lambda **_: None)
    with pytest.raises(launch.ShortOfMemory, match=r"--set runtime\.device_batch\.pretrain=N"):
        launch.insist(made, "pretrain", tries=2)


def test_rows_are_halved_down_to_one(toy: Toy) -> None:
    made, seen = toy.plan("runtime.device_batch.sft=3"), []
    for _ in range(3):
        made = launch.with_fewer_rows(made, "sft")
        seen.append(made.runtime.device_batch["sft"])
    assert seen == [1, 1, 1]
    assert launch.with_fewer_rows(toy.plan(), "mid").runtime.device_batch == {"mid": guard.FEW_ROWS}


@pytest.mark.parametrize(("deaf", "itself"), [("pass", False), ("raise SystemExit", True)])
def test_what_does_not_end_while_memory_is_gone_is_killed(deaf: str, itself: bool, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal, time\ndef stop(*_):\n    {deaf}\nsignal.signal(signal.SIGTERM, stop)\n"
    code += f"open({str(ready)!r}, 'w').close()\nwhile True: time.sleep(0.05)"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        while not ready.exists():
            pass
        see = (lambda: "stop") if itself else (lambda: "kill")
        assert guard.relieve(process, 20, see, poll=0.02) is itself


def test_waiting_for_memory_ends_when_it_is_back_or_the_run_is_cancelled() -> None:
    answers = iter(["stop", ""])
    guard.await_memory(60, lambda: next(answers))
    guard.await_memory(60, lambda: "stop", stopping=lambda: True)


def test_a_stage_offers_itself_to_the_kernel_before_anything_else() -> None:
    code = "from nanochat_core.machine.guard import offer_first; offer_first()\n"
    code += "print(open('/proc/self/oom_score_adj').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "500"
