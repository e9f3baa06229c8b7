"""A Prefect server for the session, and flows that do not wait for their heartbeat."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),  # each run would wait 1 s to join it
    ):
        yield


@pytest.fixture
def prefect_home(prefect_server: None, tmp_path: Path) -> Path:
    """A home for a server of the test's own. The database has its tables, which take longest."""
    from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL

    home = tmp_path / "prefect"
    home.mkdir()
    path = str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()).partition("///")[2]
    with closing(sqlite3.connect(path)) as ours, closing(sqlite3.connect(home / "prefect.db")) as copy:
        ours.backup(copy)
    return home
