"""What the UI is shown stays bounded: old curves go, those of other runs stay."""

from uuid import UUID

import pytest
from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows import watch

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow(name="curves")
def draw(names: list[str]) -> None:
    for name in names:
        create_markdown_artifact(name, key="bounded-curve")
        watch.prune("bounded-curve", UUID(str(runtime.flow_run.id)))


def test_the_newest_curves_of_a_run_are_kept_and_other_runs_lose_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "KEEP_CURVES", 2)
    draw(["another run's"])
    draw(["first", "second", "third", "fourth"])
    with get_client(sync_client=True) as client:
        only = ArtifactFilter(key=ArtifactFilterKey(any_=["bounded-curve"]))
        kept = {str(found.data) for found in client.read_artifacts(artifact_filter=only)}
    assert kept == {"another run's", "third", "fourth"}
