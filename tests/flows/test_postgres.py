"""Prefect on a real PostgreSQL: a run, database and server restarted in its middle, and the run's end."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_services import Machine, until

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "database.py"


def benchmark() -> Any:
    spec = spec_from_file_location("database", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(benchmark().binaries() is None, reason="PostgreSQL is not installed"),
    pytest.mark.skipif(
        os.geteuid() == 0 and shutil.which("runuser") is None,
        reason="PostgreSQL will not run as root",
    ),
]


@pytest.fixture
def database() -> Iterator[Any]:
    folder = Path(tempfile.mkdtemp(prefix="nanochat-postgres-"))
    folder.chmod(0o755)  # its user has to get through
    with benchmark().postgres(folder / "server") as server:
        yield server
    shutil.rmtree(folder)


@pytest.fixture
def machine(tmp_path: Path, database: Any) -> Iterator[Machine]:
    found = Machine(tmp_path)
    found.env["PREFECT_API_DATABASE_CONNECTION_URL"] = database.url
    yield found
    for process in found.processes():
        process.kill()


def server_of(machine: Machine) -> psutil.Process:
    (found,) = [p for p in machine.processes() if {"server", "start"} <= set(p.cmdline())]
    return found


def test_a_run_on_postgres_outlives_restarts_of_the_database_and_of_the_server(
    machine: Machine, database: Any
) -> None:
    machine.up()
    run = machine.start("pretrain.steps=300")
    until(lambda: machine.step() >= 20, 180)
    database.stop()
    database.start()
    old = server_of(machine)
    old.send_signal(signal.SIGKILL)
    until(lambda: not old.is_running() or old.status() == "zombie", 30)
    until(lambda: machine.up() is None and machine.state(run) == "Running", 120)
    assert server_of(machine).pid != old.pid
    until(lambda: machine.state(run) in ("Completed", "Failed", "Crashed"), 500)
    assert machine.state(run) == "Completed"
    assert database.ask(f"select state_type from flow_run where id = '{run}'") == "COMPLETED"
    finished = database.ask(
        f"select count(distinct name) from task_run where flow_run_id = '{run}' and state_type = 'COMPLETED'"
    )
    assert int(finished) == len([path for path in machine.base.glob("*/*/result.json")])
    assert all(
        path.read_text().count('"started"') == 1 for path in machine.base.glob("*/*/attempts.jsonl")
    )  # the training never noticed
    assert not list(machine.base.parent.rglob("prefect.db"))  # and nothing went to SQLite
    machine.nanochat("down")
    until(lambda: machine.processes() == [], 60)
