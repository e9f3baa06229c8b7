"""What the doctor finds, on machines that a test makes up at the edges it reads."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from toys import Toy

from nanochat_core.machine import probes, trial
from nanochat_core.machine.hardware import Machine, Said
from nanochat_core.machine.probes import Edges, Reached
from nanochat_core.runner import doctor
from nanochat_core.runner import plan as plans
from nanochat_core.runner.doctor import Line

SPARK = "NVIDIA GB10, 580.95.05, 12.1, 55.80, 64"
GIB = 2**20  # kB
TRIED = {"torch": "2.15.0", "cuda": "13.2", "device": "cuda", "name": "NVIDIA GB10", "capability": "12.1"}
TRIED |= {"dtype": "bfloat16", "peak": 125e12, "flops": 93e12, "compile": "ok"}


class Box:
    """A machine whose every edge is the test's; a healthy Spark to begin with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers = {"nvidia-smi": Said(0, SPARK), "timedatectl": Said(0, "yes")}
        self.answers["systemctl"] = Said(0, "masked\nmasked\nmasked\nmasked")
        self.tried: dict[str, Any] = dict(TRIED)
        self.trials: list[dict[str, Any]] = []
        self.free, self.speed = 3_000_000_000_000, (2e9, 0.004)
        self.reached = Reached("", time.time())
        self.memory(118, swap=0)
        self.file("run/systemd/system/x", "")
        self.file("proc/sys/kernel/osrelease", "6.14.0-1013-nvidia")

    def file(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def memory(self, available: float, swap: float) -> None:
        rows = {"MemTotal": 120, "MemAvailable": available, "SwapTotal": swap}
        self.file("proc/meminfo", "\n".join(f"{k}: {int(v * GIB)} kB" for k, v in rows.items()))

    def ask(self, words: Sequence[str]) -> Said:
        return self.answers.get(words[0], Said(127, ""))

    def attempt(self, **asked: Any) -> dict[str, Any]:
        self.trials.append(asked)
        if asked.get("env"):
            return self.tried | {"compile": "ok"}
        return self.tried

    def edges(self, **env: str) -> Edges:
        return Edges(
            Machine(self.root, self.ask),
            free=lambda path: self.free,
            probe=lambda path: self.speed,
            reach=lambda url: self.reached,
            trial=self.attempt,
            which=lambda name: f"/usr/bin/{name}",
            env=env,
        )

    def examine(self, plan: plans.Plan, **env: str) -> dict[str, Line]:
        found = doctor.examine(plan, plans.explain(plan), self.edges(**env))
        return {line.name: line for line in found.lines}


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    from nanochat_core.infer import sandbox

    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    monkeypatch.setattr(sandbox, "available", lambda: "bubblewrap")
    return Box(tmp_path / "root")


@pytest.fixture
def spark(tmp_path: Path) -> plans.Plan:
    return plans.load("dgx-spark", base_dir=tmp_path / "base")


def test_a_healthy_spark_is_fit_and_every_line_says_so(box: Box, spark: plans.Plan) -> None:
    found = box.examine(spark)
    assert {line.state for line in found.values()} == {"ok"}, found
    names = "GPU driver torch compiler speed memory swap suspend disk writing network clock sandbox"
    assert list(found) == names.split()
    assert found["speed"].found == "93 TFLOP/s in matrix products, 74% of nominal"
    assert box.trials == [{"device": "cuda", "compile": True, "burn": doctor.BURN_SECONDS}]


@pytest.mark.parametrize(
    ("rate", "state"), [(92e12, "ok"), (85e12, "ok"), (84e12, "warn"), (60e12, "warn"), (40e12, "fail")]
)
def test_a_slow_spark_has_a_power_or_heat_fault(box: Box, spark: plans.Plan, rate: float, state: str) -> None:
    box.tried["flops"] = rate
    line = box.examine(spark)["speed"]
    assert line.state == state
    assert ("power brick" in line.remedy) == (state != "ok")


def test_another_gpu_is_held_to_its_own_peak(box: Box, spark: plans.Plan) -> None:
    box.tried |= {"name": "NVIDIA H100 80GB HBM3", "peak": 989e12, "flops": 600e12}
    assert box.examine(spark)["speed"].state == "ok"
    box.tried["flops"] = 200e12
    assert box.examine(spark)["speed"].state == "fail"
    box.tried["peak"] = None
    assert "not in the table" in box.examine(spark)["speed"].found


def test_a_broken_driver_is_named_with_its_own_words(box: Box, spark: plans.Plan) -> None:
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    box.answers["nvidia-smi"] = Said(9, words)
    box.tried = {"torch": "2.15.0", "cuda": "13.2", "device": "cpu", "dtype": "float32", "compile": "ok"}
    found = box.examine(spark)
    assert found["GPU"] == ("GPU", "fail", words, found["GPU"].remedy) and "reboot" in found["GPU"].remedy
    assert found["torch"].state == "fail" and "sees no GPU" in found["torch"].found
    box.tried = {"error": "Segmentation fault"}
    assert box.examine(spark)["torch"].found == "Segmentation fault"


def test_fewer_gpus_than_the_profile_wants_is_a_fault(box: Box, tmp_path: Path) -> None:
    wanted = plans.load("speedrun-8xh100", base_dir=tmp_path / "base")
    line = box.examine(wanted)["GPU"]
    assert line.state == "fail" and "1 of the 8" in line.found and "runtime.nproc=1" in line.remedy


def test_the_systems_ptxas_is_used_only_where_compiling_fails_without_it(box: Box, spark: plans.Plan) -> None:
    box.file(doctor.PTXAS, "")
    assert doctor.examine(spark, plans.explain(spark), box.edges()).env == {}
    box.tried["compile"] = "ptxas fatal: Value 'sm_121a' is not defined for option 'gpu-name'"
    found = doctor.examine(spark, plans.explain(spark), box.edges())
    assert found.env == {"TRITON_PTXAS_PATH": str(box.root / doctor.PTXAS)}
    line = next(line for line in found.lines if line.name == "compiler")
    assert line.state == "ok" and "TRITON_PTXAS_PATH" in line.found
    line = box.examine(spark, TRITON_PTXAS_PATH="/elsewhere")[
        "compiler"
    ]  # theirs fails too: told, not replaced
    assert line.state == "fail" and "sm_121a" in line.found


def test_an_old_driver_a_bad_kernel_and_an_old_cuda_are_told(box: Box, spark: plans.Plan) -> None:
    box.answers["nvidia-smi"] = Said(0, SPARK.replace("580.95.05", "570.12"))
    box.file("proc/sys/kernel/osrelease", "6.17.0-1008-nvidia")
    box.tried["cuda"] = "12.8"
    found = box.examine(spark)
    assert [found[name].state for name in ("driver", "kernel", "torch")] == ["warn"] * 3


def test_memory_that_others_hold_and_swap_are_told_on_a_spark(box: Box, spark: plans.Plan) -> None:
    box.memory(60, swap=16)
    found = box.examine(spark)
    assert found["memory"].state == "warn" and "drop_caches" in found["memory"].remedy
    assert found["swap"].state == "warn" and "swapoff" in found["swap"].remedy
    box.memory(10, swap=0)
    assert box.examine(spark)["memory"].state == "fail"


def test_a_machine_that_may_sleep_is_told(box: Box, spark: plans.Plan) -> None:
    box.answers["systemctl"] = Said(0, "static\nmasked\nstatic\nstatic")
    line = box.examine(spark)["suspend"]
    assert line.state == "warn" and line.remedy.startswith("sudo systemctl mask sleep.target")


def test_a_disk_too_small_for_the_profile_is_found_before_day_eight(box: Box, spark: plans.Plan) -> None:
    box.free = 10**10
    assert box.examine(spark)["disk"].state == "fail"
    box.free = 62 * 10**9
    assert box.examine(spark)["disk"].state == "warn"  # 59.7 GB are needed


def test_a_real_disk_too_small_is_found(box: Box, spark: plans.Plan, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount")
    try:
        assert probes.free_bytes(disk / "not" / "yet") <= 80 << 20
        line = doctor.disk_line(doctor.needs(spark, plans.explain(spark)), probes.free_bytes(disk), disk)
        assert line.state == "fail" and str(disk) in line.found
        rate, sync = probes.probe(disk)
        assert rate > 0 and sync >= 0 and list(disk.iterdir()) == []
        (disk / "full").write_bytes(b"\0" * (50 << 20))
        real = Edges(Machine(box.root, box.ask), probe=probes.probe)
        line = doctor.write_line(real, disk)  # the probe itself does not fit
        assert line.state == "fail" and list(disk.iterdir()) == [disk / "full"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_base_directory_that_cannot_be_is_a_finding_not_an_error(box: Box) -> None:
    made = plans.load("cpu-demo", base_dir=Path("/proc/nanochat"))
    real = Edges(
        Machine(box.root, box.ask), probe=probes.probe, trial=box.attempt, reach=lambda url: box.reached
    )
    found = {line.name: line for line in doctor.examine(made, plans.explain(made), real).lines}
    assert found["writing"].state == "fail" and "choose another --base-dir" in found["writing"].remedy
    assert found["disk"].state == "fail"


def test_no_network_is_a_fault_only_while_something_is_to_be_fetched(
    box: Box, spark: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.reached = Reached("[Errno -2] Name or service not known", None)
    line = box.examine(spark)["network"]
    assert line.state == "fail" and "huggingface.co does not answer" in line.found
    said: list[str] = []  # a run's preflight leaves it to the downloads, which wait
    lines = doctor.preflight(spark, plans.explain(spark), said.append, box.edges())
    assert line._replace(state="warn") in lines and any(
        "huggingface.co does not answer" in words for words in said
    )
    assert "network" not in box.examine(plans.load("cpu-demo", base_dir=tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    line = box.examine(spark)["network"]
    assert line.state == "warn" and "NANOCHAT_OFFLINE" in line.found


def test_a_host_that_is_not_there_is_reached_by_nobody() -> None:
    answer = probes.reach("http://127.0.0.1:9/")  # discard: nothing listens there
    assert answer.clock is None and "refused" in answer.error.lower()


def test_a_clock_far_off_is_a_fault(box: Box, spark: plans.Plan) -> None:
    box.reached = Reached("", time.time() - 3600)
    assert box.examine(spark)["clock"].state == "fail"
    box.reached = Reached("", None)
    box.answers["timedatectl"] = Said(0, "no")
    assert box.examine(spark)["clock"].state == "warn"


def test_a_missing_sandbox_is_a_fault_where_programs_will_be_run(
    box: Box, spark: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat_core.infer import sandbox

    monkeypatch.setattr(sandbox, "available", lambda: "weaker")
    line = box.examine(spark)["sandbox"]
    assert line.state == "fail" and "apt install bubblewrap" in line.remedy
    assert "sandbox" not in box.examine(plans.load("cpu-demo", base_dir=tmp_path / "base"))


def test_on_a_cpu_box_there_is_no_word_of_gpus(box: Box, tmp_path: Path) -> None:
    del box.answers["nvidia-smi"], box.answers["systemctl"]
    box.tried = {"torch": "2.15.0", "cuda": "13.2", "device": "cpu", "dtype": "bfloat16", "flops": 2e11}
    found = box.examine(plans.load("cpu-demo", base_dir=tmp_path / "base"))
    assert not {"GPU", "driver", "compiler"} & set(found)
    assert {line.state for name, line in found.items() if name != "suspend"} == {"ok"}


def test_the_burn_waits_for_nobody_and_disturbs_nobody(box: Box, spark: plans.Plan) -> None:
    from nanochat_core.artifacts import store

    with store.locked(spark.runtime.base_dir / "locks" / "device.lock"):
        line = box.examine(spark)["speed"]
    assert line.state == "ok" and "a stage is at work" in line.found
    assert box.trials[0]["burn"] == 0


def test_a_run_ends_over_what_is_broken_and_names_all_of_it(box: Box, spark: plans.Plan) -> None:
    box.free, box.tried["flops"] = 10**9, 30e12
    said: list[str] = []
    with pytest.raises(
        doctor.RequirementsNotMet, match=r"dgx-spark.*speed:.*power brick.*disk:.*nanochat gc"
    ) as refusal:
        doctor.preflight(spark, plans.explain(spark), said.append, box.edges())
    assert len(said) == 2 and "nanochat doctor dgx-spark" in str(refusal.value)


UNDER_WAY = plans.Verdict("resume", "was interrupted", 900)


def test_a_run_under_way_is_told_of_a_slow_gpu_and_a_full_disk_and_not_ended_by_them(
    box: Box, spark: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.tried["flops"], box.tried["compile"] = 30e12, "ptxas fatal"
    box.free = 10**9
    box.file(doctor.PTXAS, "")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # so that what the preflight sets is undone
    said: list[str] = []
    lines = doctor.preflight(spark, plans.explain(spark) | {"pretrain": UNDER_WAY}, said.append, box.edges())
    found = {line.name: line.state for line in lines}
    assert (found["speed"], found["disk"]) == ("warn", "warn")
    assert [words.split(":")[0] for words in said] == ["speed", "disk"]
    import os

    assert os.environ["TRITON_PTXAS_PATH"] == str(box.root / doctor.PTXAS)  # its stages inherit it


def test_a_run_under_way_waits_for_a_driver_that_is_not_up_yet(
    box: Box, spark: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = box.answers["nvidia-smi"]
    box.answers["nvidia-smi"] = Said(9, "couldn't communicate with the NVIDIA driver")
    monkeypatch.setattr(doctor.time, "sleep", lambda seconds: box.answers.update({"nvidia-smi": there}))
    said: list[str] = []
    lines = doctor.preflight(spark, plans.explain(spark) | {"pretrain": UNDER_WAY}, said.append, box.edges())
    assert {line.state for line in lines} == {"ok"}
    assert len(said) == 1 and "looking again" in said[0]


def test_a_run_that_has_not_begun_does_not_wait(box: Box, spark: plans.Plan) -> None:
    box.answers["nvidia-smi"] = Said(9, "couldn't communicate with the NVIDIA driver")
    with pytest.raises(doctor.RequirementsNotMet, match="couldn't communicate"):
        doctor.preflight(spark, plans.explain(spark), lambda words: None, box.edges())


def test_checkpoints_that_lie_there_are_not_asked_for_again(box: Box, spark: plans.Plan) -> None:
    begun = plans.explain(spark) | {"pretrain": UNDER_WAY}
    before = doctor.needs(spark, begun).disk
    folder = spark.jobs["pretrain"].path / "checkpoints" / "step_00000900"
    folder.mkdir(parents=True)
    with (folder / "state.safetensors").open("wb") as file:
        file.truncate(5 * 10**9)
    assert doctor.needs(spark, begun).disk == before - 5 * 10**9


def test_a_finished_profile_is_not_tried_out(box: Box, toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    assert "torch" not in box.examine(made) and box.trials == []


@pytest.mark.slow
def test_torch_is_tried_in_a_process_of_its_own() -> None:
    found = trial.try_out(device="cpu", compile=True, burn=0.5)
    assert found["device"] == "cpu" and found["flops"] > 1e9 and found["compile"] == "ok"
    broken = trial.try_out(
        device="cpu",
        compile=True,
        burn=0.0,
        env={"CXX": "/nowhere/c++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )
    assert broken["compile"] != "ok" and "/nowhere/c++" in broken["compile"]
