"""The doctor as the first task of a run that takes days, and the report as its last word."""

from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from test_speedrun import run
from toys import Toy

from flows import examine
from nanochat_core.runner import plan as plans
from nanochat_core.runner.doctor import Line, RequirementsNotMet

pytestmark = pytest.mark.usefixtures("prefect_server")


def artifact(key: str) -> Artifact:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return found[-1]


def test_the_machine_is_examined_before_any_stage_and_not_when_nothing_is_left_to_do(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def preflight(plan: plans.Plan, verdicts: dict[str, plans.Verdict], say: Any) -> list[Line]:
        seen.append(verdicts["pretrain"].state)
        assert not plan.jobs["shards"].path.exists()
        say("swap: 16.0 GiB; sudo swapoff -a")
        return [Line("swap", "warn", "16.0 GiB", "sudo swapoff -a")]

    monkeypatch.setattr(examine, "preflight", preflight)
    assert run(toy, "runtime.preflight=true", until="pretrain").is_completed() and seen == ["run"]
    assert "swapoff" in str(artifact("doctor").data)
    toy.make(toy.plan())
    assert run(toy, "runtime.preflight=true").is_completed() and seen == ["run"]
    report = str(artifact("report").data)
    assert "# report" in report and "report.html" in report


def test_a_machine_that_is_not_fit_fails_the_run_with_the_reason_and_no_stage_begins(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preflight(*_: Any) -> list[Line]:
        raise RequirementsNotMet(
            "this machine cannot carry toy: disk: 1 GB free, 60 GB still needed (nanochat gc)"
        )

    monkeypatch.setattr(examine, "preflight", preflight)
    state = run(toy, "runtime.preflight=true")
    assert state.is_failed() and "60 GB still needed" in (state.message or "")
    assert not toy.plan().jobs["shards"].path.exists()
