"""`nanochat up`: the Prefect server, a worker and the reconciler here, started again should they end."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from flows.server import SETTINGS, ask, configured, healthy, share_password
from nanochat_core import store
from nanochat_core.launch import STOP_SECONDS
from nanochat_core.status import at_work

POOL = "nanochat"
DEPLOYMENTS = Path(__file__).resolve().parents[1] / "deployments" / "prefect.yaml"
STARTUP_SECONDS = 120.0
AGAIN_SECONDS = 5.0  # before a service that ended is started again
RETENTION = {  # a ten-day run is never touched: only what has ended is deleted
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "7d",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": "90d",
    "PREFECT_WORKER_QUERY_SECONDS": "5",  # between two looks at the queue: part of what a crash costs
}


def folder(base_dir: Path) -> Path:
    return base_dir / "prefect" / "services"


def up(base_dir: Path, port: int) -> str:
    """Start what is not running, register the deployments; the API's address."""
    where = folder(base_dir)
    where.mkdir(parents=True, exist_ok=True)
    share_password()
    url = configured() or f"http://127.0.0.1:{port}/api"
    with store.locked(where / "supervisor.lock", wait=False) as free:
        pass
    if free:
        own = configured() is None  # a server somewhere else is not ours to start
        with (where / "supervisor.log").open("ab") as out:
            subprocess.Popen(
                [sys.executable, "-m", "flows.services", str(base_dir), url, str(port if own else 0)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    deadline = time.monotonic() + STARTUP_SECONDS
    while not healthy(url):
        if time.monotonic() > deadline:
            raise ConnectionError(f"no Prefect server answers at {url}; its log: {where / 'server.log'}")
        time.sleep(0.5)
    os.environ["PREFECT_API_URL"] = url
    register()
    return url


def register() -> None:
    """The work pool, one run at a time on this machine, and a deployment for each profile."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
            client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            # Console output is streamed through the worker, and would end the run with it.
            template["variables"]["properties"]["stream_output"]["default"] = False
            pool = WorkPoolCreate(name=POOL, type="process", concurrency_limit=1, base_job_template=template)
            client.create_work_pool(pool)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "prefect",
            "--no-prompt",
            "deploy",
            "--prefect-file",
            str(DEPLOYMENTS),
            "--all",
        ],
        capture_output=True,
        text=True,
        cwd=DEPLOYMENTS.parent,
        env=os.environ | SETTINGS | {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"the deployments could not be registered:\n{(done.stdout + done.stderr)[-2000:]}")


def down(base_dir: Path) -> bool:
    """End the services, if there are any; a run at work saves, and the next `up` has it go on."""
    where = folder(base_dir)
    with store.locked(where / "supervisor.lock", wait=False) as free:
        if free:  # killed, perhaps, and what it started lives on
            left = any(alive(where, name) for name in ("recovery", "worker", "server"))
            end_all(base_dir)
            return left
    os.kill(int(json.loads((where / "supervisor.json").read_text())["pid"]), signal.SIGTERM)
    with store.locked(where / "supervisor.lock"):
        return True


def running(base_dir: Path) -> dict[str, str]:
    """What Prefect says of the runs that are not over, by name, asked of the server of this base directory;
    nothing if there is none or it does not answer."""
    where = folder(base_dir)
    try:
        url = configured() or json.loads((where / "supervisor.json").read_text())["url"]
        states = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED"]}}
        question = {"flow_runs": {"state": states}, "flows": {"name": {"any_": ["speedrun"]}}, "limit": 20}
        share_password()
        found = ask(url, "flow_runs/filter", question)
    except (OSError, ValueError):
        return {}
    ui = url.removesuffix("/api")
    return {run["name"]: f"{run['state_name']}  {ui}/runs/flow-run/{run['id']}" for run in found}


class Stop(Exception):
    """The supervisor was told to end."""


def supervise(base_dir: Path, url: str, port: int) -> None:
    """Keep the services running until told to stop; the server only if it is ours (a port is given)."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stop

    signal.signal(signal.SIGTERM, stop)
    share_password()  # a unit file starts us without `up`
    where = folder(base_dir)
    python = [sys.executable, "-m"]
    worker = f"prefect worker start --pool {POOL} --type process --limit 1 --install-policy never".split()
    commands = {
        "worker": [*python, *worker],
        "recovery": [*python, "flows.recovery"],
    }
    if port:
        start = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        commands = {"server": [*python, *start], **commands}
    own = {"PREFECT_API_URL": url, "NANOCHAT_BASE_DIR": str(base_dir)}
    env = RETENTION | os.environ | SETTINGS | own
    started: dict[str, subprocess.Popen[bytes]] = {}
    again: dict[str, float] = {}
    with store.locked(where / "supervisor.lock", wait=False) as ours:
        if not ours:
            return
        store.write_json(where / "supervisor.json", {"pid": os.getpid(), "url": url})
        try:
            while True:
                for name, command in commands.items():
                    if alive(where, name, started.get(name)):
                        continue
                    if name in started and name not in again:
                        code = started[name].returncode
                        print(f"{name} ended with {code}; it is started again", flush=True)
                        again[name] = time.monotonic() + AGAIN_SECONDS
                    if again.get(name, 0) <= time.monotonic() and (name == "server" or healthy(url)):
                        again.pop(name, None)
                        started[name] = service(name, command, where, env)
                time.sleep(1)
        except Stop:
            end_all(base_dir)


def end_all(base_dir: Path) -> None:
    for name in ("recovery", "worker", "server"):  # the server last: the others have something to tell it
        end(folder(base_dir), name)
        if name == "worker":  # its run is gone with it, and the stage at work is saving
            await_stages(base_dir)


def await_stages(base_dir: Path) -> None:
    """Wait until no stage of this base directory is at work, but not for ever."""
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and any(
        at_work(lock) for lock in (base_dir / "locks").glob("*-*.lock")
    ):
        time.sleep(0.5)


# A service holds a lock for as long as it lives, so that a new supervisor finds those of one that was killed.


def service(name: str, command: list[str], where: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    with (where / f"{name}.log").open("ab") as out, (where / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),  # what it starts itself does not inherit it
            env=env,
        )
        lock.write(str(process.pid))
        return process


def alive(where: Path, name: str, process: "subprocess.Popen[bytes] | None" = None) -> bool:
    if process is not None:
        process.poll()  # so that a dead child does not stay a zombie
    with store.locked(where / f"{name}.lock", wait=False) as free:
        return not free


def end(where: Path, name: str) -> None:
    """Ask a service to end, and make it after half a minute."""
    for number, seconds in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
        if not alive(where, name):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((where / f"{name}.lock").read_text()), number)
        deadline = time.monotonic() + seconds
        while alive(where, name) and time.monotonic() < deadline:
            time.sleep(0.1)


if __name__ == "__main__":
    supervise(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
