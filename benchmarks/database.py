"""What Prefect's database takes on disk for each task run, on SQLite and on PostgreSQL.

A flow of so many small tasks runs against a fresh server of each kind; the sizes are what the databases say.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

VERSIONS = Path("/usr/lib/postgresql")  # where Debian puts them
FLOW = """
import sys
from prefect import flow, get_run_logger, task

@task
def small(i: int) -> int:
    get_run_logger().info(f"task {i} of a run whose tasks say one line each")
    return i

@flow
def many(n: int) -> None:
    for i in range(n):
        small(i)

many(int(sys.argv[1]))
"""


def binaries() -> Path | None:
    """PostgreSQL's programs, the newest version there is."""
    found = sorted(VERSIONS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Postgres:
    """A PostgreSQL of our own in a folder, on 127.0.0.1, with a password, as a user that is not root."""

    def __init__(self, folder: Path) -> None:
        found = binaries()
        assert found is not None, "PostgreSQL is not installed: apt-get install postgresql"
        self.bin, self.port, self.data = found, free_port(), folder / "data"
        self.as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        folder.mkdir(parents=True)
        if self.as_user:
            shutil.chown(folder, "postgres")
        password = folder / "password"
        password.write_text("prefect\n")
        if self.as_user:
            shutil.chown(password, "postgres")
        self.run("initdb", "-D", str(self.data), "-U", "prefect", "-A", "scram-sha-256",
                 f"--pwfile={password}", "-E", "UTF8", "--no-locale")  # fmt: skip
        self.start()
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "prefect")
        self.url = f"postgresql+asyncpg://prefect:prefect@127.0.0.1:{self.port}/prefect"

    def run(self, program: str, *words: str) -> str:
        command = [*self.as_user, "env", "PGPASSWORD=prefect", str(self.bin / program), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        if done.returncode != 0:
            raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self) -> None:
        settings = f"-h 127.0.0.1 -p {self.port} -k {self.data}"
        command = [*self.as_user, str(self.bin / "pg_ctl"), "-D", str(self.data), "-w", "-l",
                   str(self.data / "server.log"), "-o", settings, "start"]  # fmt: skip
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, cwd="/"
        )  # it inherits what we hold open

    def stop(self, how: str = "fast") -> None:
        self.run("pg_ctl", "-D", str(self.data), "-m", how, "-w", "stop")

    def ask(self, sql: str) -> str:
        """One value."""
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "-d", "prefect"]
        return self.run("psql", *where, "-Atc", sql).strip()

    def size(self) -> int:
        return int(self.ask("select pg_database_size('prefect')"))


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    server = Postgres(folder)
    try:
        yield server
    finally:
        with contextlib.suppress(RuntimeError):  # it may have been stopped
            server.stop("immediate")


def sqlite_size(home: Path) -> int:
    database = home / "prefect.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
    return database.stat().st_size


@contextlib.contextmanager
def prefect_server(home: Path, env: dict[str, str]) -> Iterator[str]:
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"} | env,
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError), urlopen(f"{api}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((home / "server.log").read_text()[-2000:])
            time.sleep(0.5)
        yield api
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def count(api: str, what: str) -> int:
    request = Request(f"{api}/{what}/count", b"{}", {"content-type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return int(json.load(answer))


def run_tasks(api: str, home: Path, tasks: int) -> None:
    """So many task runs, and until the server has them all."""
    env = os.environ | {"PREFECT_API_URL": api, "PREFECT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "INFO",
                        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}  # fmt: skip
    before = count(api, "task_runs")
    subprocess.run([sys.executable, "-c", FLOW, str(tasks)], check=True, env=env)
    deadline = time.monotonic() + 300
    while count(api, "task_runs") < before + tasks:
        if time.monotonic() > deadline:
            raise RuntimeError("the server has not taken all task runs")
        time.sleep(1)
    time.sleep(10)  # events are written in batches


def measure(tasks: int, folder: Path) -> dict[str, dict[str, float]]:
    found = {}
    home = folder / "sqlite"
    with prefect_server(home, {}) as api:
        run_tasks(api, home, 10)  # tables, indexes and the flow itself
        before, begin = sqlite_size(home), time.monotonic()
        run_tasks(api, home, tasks)
        seconds = time.monotonic() - begin
        after = sqlite_size(home)
    found["SQLite"] = {"before": before, "after": after, "seconds": seconds}
    home = folder / "prefect"
    with (
        postgres(folder / "postgres") as database,
        prefect_server(home, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database.url}) as api,
    ):
        run_tasks(api, home, 10)
        before, begin = database.size(), time.monotonic()
        run_tasks(api, home, tasks)
        seconds = time.monotonic() - begin
        found["PostgreSQL"] = {"before": before, "after": database.size(), "seconds": seconds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nanochat-database-"))
    folder.chmod(0o755)  # PostgreSQL's user has to get through
    try:
        found = measure(args.tasks, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'':12}{'empty MB':>10}{'after MB':>10}{'kB/task run':>13}")
    each = {name: (row["after"] - row["before"]) / args.tasks for name, row in found.items()}
    for name, row in found.items():
        print(f"{name:12}{row['before'] / 1e6:10.1f}{row['after'] / 1e6:10.1f}{each[name] / 1e3:13.2f}")
    print(f"PostgreSQL takes {each['PostgreSQL'] / each['SQLite']:.2f} of SQLite's bytes for a task run")
    if args.json:
        print(json.dumps({"tasks": args.tasks, "databases": found}))


if __name__ == "__main__":
    main()
