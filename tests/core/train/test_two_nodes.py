"""Two machines, as this one can play them: a launcher each, one base directory, a rendezvous between them."""

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import make

from nanochat_core.artifacts.stage import Runtime
from nanochat_core.runner import join, launch, rendezvous
from nanochat_core.runner import plan as plans

pytestmark = pytest.mark.timeout(600)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def plan(base: Path, *overrides: str) -> plans.Plan:
    return plans.load("tiny", ["runtime.save_steps=2", *overrides], base_dir=base, until="pretrain")


def two_machines(base: Path) -> plans.Plan:
    return plan(base, "runtime.nnodes=2", f"runtime.rendezvous=127.0.0.1:{free_port()}")


def weights(made: plans.Plan) -> str:
    return hashlib.sha256((made.jobs["pretrain"].path / "model.safetensors").read_bytes()).hexdigest()


class Second:
    """The other machine's `nanochat join`."""

    def __init__(self, base: Path, log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nanochat_core.cli.main", "join", "--base-dir", str(base)],
                stdin=subprocess.DEVNULL,
                stderr=out,
                start_new_session=True,
            )

    def leave(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(150)


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Second]:
    (tmp_path / "base").mkdir()
    found = Second(tmp_path / "base", tmp_path / "second.log")
    yield found
    found.leave()


def before_pretraining(base: Path) -> None:
    make(plan(base), "shards_head", "shards", "tokenizer")


@pytest.mark.slow
def test_two_machines_end_in_the_weights_of_two_processes_on_one(tmp_path: Path, second: Second) -> None:
    base, alone = tmp_path / "base", tmp_path / "alone"
    before_pretraining(base)
    shutil.copytree(base, alone)
    one = plan(alone, "runtime.nproc=2")
    launch.launch(one, "pretrain")
    two = two_machines(base)
    launch.launch(two, "pretrain")
    assert weights(two) == weights(one)
    deadline = time.monotonic() + 60
    while "pretrain is done" not in second.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "pretrain is done" in second.log.read_text()
    assert second.leave() == 130


@pytest.mark.slow
def test_the_first_machine_waits_for_the_other_to_come_back(tmp_path: Path, second: Second) -> None:
    base, alone = tmp_path / "base", tmp_path / "alone"
    before_pretraining(base)
    shutil.copytree(base, alone)
    one = plan(alone, "runtime.nproc=2", "pretrain.steps=60")
    launch.launch(one, "pretrain")
    two = plan(base, "runtime.nnodes=2", f"runtime.rendezvous=127.0.0.1:{free_port()}", "pretrain.steps=60")
    calls: list[object] = []
    again: list[Second] = []

    def pull_the_plug(row: object) -> None:
        if not calls and (plans.saved_step(two.jobs["pretrain"].path) or 0) >= 10:
            calls.append(rendezvous.called(base))
            kill_tree(second.process.pid)

    def come_back() -> bool:
        """Once the first has called again; it is never told to stop."""
        if calls and not again and rendezvous.called(base) not in calls:
            again.append(Second(base, tmp_path / "third.log"))
        return False

    try:
        launch.insist(two, "pretrain", pull_the_plug, stopping=come_back)
    finally:
        for machine in again:
            machine.leave()
    assert again and weights(two) == weights(one)


def kill_tree(pid: int) -> None:
    """A power cut, for one of the two."""
    import psutil

    process = psutil.Process(pid)
    for one in [*process.children(recursive=True), process]:
        one.kill()


@pytest.mark.slow
def test_a_stage_on_several_ranks_that_is_told_to_stop_says_interrupted(tmp_path: Path) -> None:
    made = plan(tmp_path, "runtime.nproc=2", "pretrain.steps=400")
    before_pretraining(tmp_path)
    with pytest.raises(launch.Interrupted):
        launch.launch(
            made,
            "pretrain",
            stopping=lambda: (plans.saved_step(made.jobs["pretrain"].path) or 0) >= 4,
        )
    log = (made.jobs["pretrain"].path / "log.txt").read_text()
    assert "told to stop; saved a checkpoint" in log


def test_the_first_machine_calls_and_the_other_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(base_dir=tmp_path, nnodes=2, nproc=4, rendezvous=f"127.0.0.1:{free_port()}")
    job = tmp_path / "pretrain" / ("f" * 20) / "job.json"
    (tmp_path / "locks").mkdir()
    assert rendezvous.heard(tmp_path) is None
    words = rendezvous.torchrun(job, runtime)
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d"} <= set(words)
    assert f"--rdzv-endpoint={runtime.rendezvous}" in words and "--local-addr=127.0.0.1" in words
    assert any("is_host=1" in word for word in words)
    assert rendezvous.heard(tmp_path) is None  # the call lies there, but nobody is at the other end
    with socket.create_server(("127.0.0.1", int(str(runtime.rendezvous).rpartition(":")[2]))):
        call = rendezvous.heard(tmp_path)
        assert call is not None and call["job"] == f"pretrain/{'f' * 20}/job.json"
        moved = tmp_path.with_name("elsewhere")
        shutil.copytree(tmp_path, moved)
        with pytest.raises(ValueError, match="mount it at the same path"):
            rendezvous.heard(moved)
    monkeypatch.setenv(rendezvous.ANSWER, json.dumps(call))
    answer = rendezvous.torchrun(job, runtime)
    assert any("is_host=0" in word for word in answer)
    assert [w for w in words if "rdzv-id" in w] == [w for w in answer if "rdzv-id" in w]


def test_a_name_that_leads_back_to_this_machine_is_no_place_to_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = {"spark-1": "127.0.1.1", "spark-2": "192.168.100.2"}  # as Ubuntu's /etc/hosts has its own name

    def looked_up(host: str, *_: object) -> list[object]:
        if host not in hosts:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (hosts[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(socket, "gethostname", lambda: "spark-1")
    rendezvous.refuse_loopback(Runtime(base_dir=tmp_path))
    for meeting in ("spark-2:29400", "192.168.100.1:29400", "127.0.0.1:29400"):
        rendezvous.refuse_loopback(Runtime(base_dir=tmp_path, nnodes=2, rendezvous=meeting))
    with pytest.raises(ValueError, match=r"spark-1, which is 127\.0\.1\.1.*set runtime\.rendezvous"):
        rendezvous.refuse_loopback(Runtime(base_dir=tmp_path, nnodes=2))
    with pytest.raises(ValueError, match="nowhere, which has no address here"):
        rendezvous.refuse_loopback(Runtime(base_dir=tmp_path, nnodes=2, rendezvous="nowhere:1"))


def test_joining_says_once_that_a_call_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "POLL_SECONDS", 0.0)
    runtime = Runtime(base_dir=tmp_path, nnodes=2, rendezvous=f"127.0.0.1:{free_port()}")
    job = tmp_path / "pretrain" / ("f" * 20) / "job.json"
    job.parent.mkdir(parents=True)
    (tmp_path / "locks").mkdir()
    rendezvous.torchrun(job, runtime)
    looks = 0

    def looked(base_dir: Path) -> None:
        nonlocal looks
        looks += 1
        if looks == 3 * join.PATIENCE:
            raise KeyboardInterrupt

    monkeypatch.setattr(join, "heard", looked)
    for began in (False, True):
        said: list[str] = []
        looks = 0
        if began:
            job.write_text("{}")
        with pytest.raises(KeyboardInterrupt):
            join.join(tmp_path, said.append)
        assert len(said) == (1 if began else 0)
    assert f"a call names {runtime.rendezvous}, which does not answer" in said[0]
    (job.parent / "result.json").write_text("{}")
    assert rendezvous.unanswered(tmp_path) is None  # the stage is done: nobody waits


def test_one_machine_needs_no_rendezvous(tmp_path: Path) -> None:
    runtime = Runtime(base_dir=tmp_path, nproc=8)
    assert rendezvous.torchrun(tmp_path / "job.json", runtime) == ["--standalone", "--nproc-per-node=8"]
    assert not rendezvous.call_path(tmp_path).exists()


def test_a_rendezvous_without_a_port_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runtime\.rendezvous"):
        plan(tmp_path, "runtime.rendezvous=spark-1")


def test_the_profile_for_two_sparks_trains_the_same_model_as_for_one(tmp_path: Path) -> None:
    one, two = (plans.load(name, base_dir=tmp_path) for name in ("dgx-spark", "dgx-spark-x2"))
    assert [job.fingerprint for job in one.jobs.values()] == [job.fingerprint for job in two.jobs.values()]
    assert two.runtime.processes == 2 and two.runtime.environment["NCCL_IB_HCA"].count(",") == 1


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4711",
        "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
        "  exitcode  : 130 (pid: 23663)",  # its agent saw it first, and stopped the rank here
    ],
)
def test_a_machine_that_went_away_is_known_by_what_the_ranks_here_say(line: str) -> None:
    assert rendezvous.lost(["step 10 of 60", line])
    assert not rendezvous.lost(["step 10 of 60", "  exitcode  : 1 (pid: 1300)", "error: the loss is nan"])
