"""A short drill: faults at random moments of a run on a real server, with worker and reconciler."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).resolve().parents[2] / "benchmarks" / "fault_drill.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_at_random_moments_cost_no_run_and_no_bit() -> None:
    kinds = ["trainer", "flow", "power", "flipped", "truncated", "SIGTERM"]
    command = [sys.executable, str(DRILL), "--faults", "6", "--per-run", "6", "--seed", "7", "--until", "mid"]
    done = subprocess.run([*command, "--json", "--only", *kinds], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lost"] == {} and found["faults"] >= 6
    assert set(found["by_kind"]) >= {"SIGKILL trainer", "power cut", "one bit flipped"}
