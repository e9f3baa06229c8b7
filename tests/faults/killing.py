"""Stages of a `tiny` run, started and killed, and what must be the same afterwards."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import store
from nanochat_core.runner import launch
from nanochat_core.runner import plan as plans

LAST = "rl"


def tiny(base_dir: Path, *overrides: str) -> plans.Plan:
    return plans.load("tiny", overrides, base_dir=base_dir, until=LAST)


def weights_and_losses(base_dir: Path, stage: str) -> tuple[str, list[tuple[int, float]]]:
    """What must not depend on what happened on the way."""
    path = tiny(base_dir).jobs[stage].path
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return digest, [(row["step"], row["loss"]) for row in rows if "loss" in row]


def start(base_dir: Path, stage: str, *overrides: str) -> "subprocess.Popen[bytes]":
    """A stage's process, as launch starts it but ours to kill."""
    plan = tiny(base_dir, *overrides)
    path = plan.jobs[stage].path
    path.mkdir(parents=True, exist_ok=True)
    store.write_json(path / "job.json", launch.describe(plan, stage, None))
    with (path / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nanochat_core.runner.launch", str(path / "job.json")],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"NANOCHAT_PARENT": str(os.getpid())},
        )


def wait_for_step(process: "subprocess.Popen[bytes]", path: Path, step: int) -> None:
    """Until the stage has recorded a step, or has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        rows: list[dict[str, Any]] = []
        if (path / "metrics.jsonl").exists():
            lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)


def kill(process: "subprocess.Popen[bytes]", number: signal.Signals) -> int:
    if process.poll() is None:
        os.killpg(process.pid, number)
    return process.wait(60)
