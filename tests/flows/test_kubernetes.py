"""The Kubernetes pool's commands as they are written down, against a real server; no cluster is asked."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deployments" / "kubernetes"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def written_down() -> list[list[str]]:
    """The README's commands that need no cluster, each as its words."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.strip().startswith("prefect ")]
    return [words for words in lines if words[1] != "worker"]


@pytest.mark.usefixtures("prefect_server")
def test_the_documented_commands_make_a_pool_and_a_run_on_it() -> None:
    env = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    for words in written_down():
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT, env=env
        )
        assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("speedrun/dgx-spark-k8s")
        assert deployment.work_pool_name == "nanochat-k8s" and deployment.parameters == {
            "profile": "dgx-spark"
        }
        (run,) = [run for run in client.read_flow_runs() if run.deployment_id == deployment.id]
        client.delete_flow_run(run.id)
    assert deployment.job_variables == {"image": "REGISTRY/nanochat:cuda", "gpus": 1}
    step = "prefect.deployments.steps.set_working_directory"
    assert deployment.pull_steps == [{step: {"directory": "/"}}]  # not the directory of whoever deployed it
