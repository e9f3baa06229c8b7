"""`nanochat up`: the Prefect server, a worker and the reconciler here, started again should they end."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from flows import engines
from flows.server import (
    SETTINGS,
    Supervisor,
    address,
    ask,
    configured,
    healthy,
    last_supervisor,
    same,
    services_folder,
    share_password,
    supervised,
)
from flows.whose import worker_name
from nanochat_core.artifacts import orphans, store
from nanochat_core.machine.installed import SAFE_PATH, deployment, module
from nanochat_core.machine.proxy import direct, local
from nanochat_core.runner.plan import saved_step
from nanochat_core.runner.status import at_work

POOL = "nanochat"
STARTUP_SECONDS = 120.0
PORT = 4200  # of the server, if none is named
ALREADY_UP = 75  # the exit code of a supervisor that finds another; systemd need not try again
NAMES = ("recovery", "worker", "server")  # ended in this order: the others have something to tell the server
AGAIN_SECONDS = 5.0  # before a service that ended is started again
RETENTION = {  # a ten-day run is never touched: only what has ended is deleted
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "7d",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": "90d",
    "PREFECT_WORKER_QUERY_SECONDS": "5",  # between two looks at the queue: part of what a crash costs
}


def folder(base_dir: Path) -> Path:
    return services_folder(base_dir)


def up(base_dir: Path, port: int | None = None) -> str:
    """Start what is not running, register the deployments; the API's address."""
    where = folder(base_dir)
    where.mkdir(parents=True, exist_ok=True)
    share_password()
    while (now := supervised(base_dir)) is None and at_work(where / "supervisor.lock"):
        time.sleep(0.2)  # one that is ending, or only beginning
    last = last_supervisor(base_dir)
    kept = now or (last if any(alive(where, name) for name in NAMES) else None)
    url, own = choose(base_dir, port) if kept is None else stay(kept, port)
    process = None
    if now is None:
        if own and not alive(where, "server") and taken(own):
            raise ValueError(f"port {own} is taken by another program; name another: nanochat up --port PORT")
        if not own:
            refuse_other_base(base_dir, url)
        process = start_supervisor(base_dir, url, own)
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not (healthy(url) and (not own or alive(where, "server"))):
            if process is not None and process.poll() == ALREADY_UP:
                return up(base_dir, port)  # somebody else's `up` was quicker
            if process is not None and process.returncode is not None:
                raise ConnectionError(f"the supervisor ended; its log: {where / 'supervisor.log'}")
            if time.monotonic() > deadline:
                what = f"its log: {where / 'server.log'}" if own else "start it, or unset PREFECT_API_URL"
                raise ConnectionError(f"no Prefect server answers at {url}; {what}")
            time.sleep(0.5)
        os.environ["PREFECT_API_URL"] = url
        register(base_dir if own else None)
    except BaseException:
        if process is not None:  # half of it up is worse than nothing: the next `up` would rely on it
            process.terminate()
            process.wait()
        raise
    return url


def choose(base_dir: Path, port: int | None) -> tuple[str, int]:
    """The API's address, and the port of our own server there; 0 for one that is somewhere else.

    The address configured may be the one that an earlier `up` advised to export: then the server is ours.
    """
    named, last = configured(), last_supervisor(base_dir)
    if named is not None:
        its = urllib.parse.urlsplit(named).port or 80
        ours = last is not None and last.port > 0 and same(named, last.url)
        if not ours and not (local(named) and its == (port or PORT)):
            return named, 0
        port = port or its
    port = port or PORT
    return f"http://127.0.0.1:{port}/api", port


def stay(kept: Supervisor, port: int | None) -> tuple[str, int]:
    """Where the services are already, unless somewhere else is asked for."""
    named = configured()
    elsewhere = named is not None and not local(named) and not same(named, kept.url)
    if elsewhere or (port is not None and kept.port and port != kept.port):
        raise ValueError(f"already up at {kept.url.removesuffix('/api')}; nanochat down first to move it")
    return kept.url, kept.port


def taken(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server does: after its own end at once
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def start_supervisor(base_dir: Path, url: str, port: int) -> "subprocess.Popen[bytes]":
    # What systemd sets for a terminal's own unit must not make this supervisor look like a unit's.
    env = {key: value for key, value in os.environ.items() if key != "INVOCATION_ID"}
    with (folder(base_dir) / "supervisor.log").open("ab") as out:
        return subprocess.Popen(
            module("flows.services", str(base_dir), url, str(port)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )


def register(base_dir: Path | None = None) -> None:
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
    path = deployments(base_dir)
    done = subprocess.run(
        module("prefect", "--no-prompt", "deploy", "--prefect-file", str(path), "--all"),
        capture_output=True,
        text=True,
        cwd=path.parent,
        env=os.environ
        | SETTINGS
        | direct(os.environ)
        | {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"the deployments could not be registered:\n{(done.stdout + done.stderr)[-2000:]}")


def refuse_other_base(base_dir: Path, url: str) -> None:
    """No worker of ours at a server that another `nanochat up` keeps for its own base directory."""
    keeps = None
    with contextlib.suppress(OSError, ValueError):  # none there yet, or it does not say
        keeps = ask(url, "deployments/name/speedrun/tiny")["parameters"].get("base_dir")
    if keeps not in (None, str(base_dir)):
        raise ValueError(
            f"the server at {url} is that of {keeps}; unset PREFECT_API_URL, or say --base-dir {keeps}"
        )


def deployments(base_dir: Path | None) -> Path:
    """The deployments to register. Those of our own server name the base directory, so that its runs are in
    there whichever worker takes them; a server of many machines (no base directory) leaves that to each
    worker."""
    shared = deployment("prefect.yaml")
    if base_dir is None:
        return shared
    import yaml

    document = yaml.safe_load(shared.read_text())
    for one in document["deployments"]:
        if one["entrypoint"] == "flows.speedrun.speedrun":
            one["parameters"]["base_dir"] = str(base_dir)
    path = folder(base_dir) / "deployments.yaml"
    store.write_whole(path, yaml.safe_dump(document, sort_keys=False))
    return path


def down(base_dir: Path) -> list[str]:
    """End the services, if there are any, and say what was ended; a run at work saves, and the next `up` has
    it go on."""
    where = folder(base_dir)
    if (now := supervised(base_dir)) is not None and now.systemd:
        raise ValueError(f"systemd would start them again; end them with: {now.systemd}")
    found = [name for name in NAMES if alive(where, name)]
    flows = engines.engines(base_dir)
    work = engines.jobs(engines.stages(base_dir, flows))
    told = None
    while True:
        with store.locked(where / "supervisor.lock", wait=False) as free:
            if free:  # it has ended, or was killed, perhaps, and what it started lives on
                end_all(base_dir)
                break
        now = supervised(base_dir)  # none while it is only starting, or ending already
        if now is not None and now != told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(now.pid, signal.SIGTERM)
            told = now
        time.sleep(0.1)
    if flows:
        found.append("a run" if len(flows) == 1 else f"{len(flows)} runs")
    for job in work:
        step = saved_step(job)
        found.append(f"{job.parent.name} (kept at step {step})" if step is not None else job.parent.name)
    return found


class FlowRun(NamedTuple):
    """A run that is not over, as Prefect sees it."""

    id: str
    profile: str | None
    state: str
    api: str

    def __str__(self) -> str:
        return f"{self.state}  {self.api.removesuffix('/api')}/runs/flow-run/{self.id}"


def running(base_dir: Path) -> dict[str, FlowRun]:
    """What Prefect says of the runs that are not over, by name, asked of the server of this base directory;
    nothing if there is none or it does not answer."""
    url = address(base_dir)
    if url is None:
        return {}
    states = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED"]}}
    question = {"flow_runs": {"state": states}, "flows": {"name": {"any_": ["speedrun"]}}, "limit": 20}
    share_password()
    try:
        found = ask(url, "flow_runs/filter", question)
    except (OSError, ValueError):
        return {}
    return {
        run["name"]: FlowRun(run["id"], run["parameters"].get("profile"), run["state_name"], url)
        for run in found
    }


def supervise(base_dir: Path, url: str, port: int) -> int:
    """Keep the services running until told to stop; the server only if it is ours (a port is given)."""
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping  # and no more than that: told twice, it still ends everything in order
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    share_password()  # a unit file starts us without `up`
    where = folder(base_dir)
    worker = f"worker start --pool {POOL} --type process --limit 1 --install-policy never".split()
    commands = {
        "worker": module("prefect", *worker, "--name", worker_name(base_dir)),  # by which its runs are known
        "recovery": module("flows.recovery"),
    }
    if port:
        start = module("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        commands = {"server": start, **commands}
    own = {"PREFECT_API_URL": url, "NANOCHAT_BASE_DIR": str(base_dir)}
    env = RETENTION | os.environ | SETTINGS | SAFE_PATH | direct(os.environ) | own
    started: dict[str, subprocess.Popen[bytes]] = {}
    again: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for _ in range(20):  # whoever looks whether we live holds the lock for a moment
            ours = stack.enter_context(store.locked(where / "supervisor.lock", wait=False))
            if ours:
                break
            time.sleep(0.1)
        else:
            print("the services are up already; nanochat down first to have them started from here")
            return ALREADY_UP
        note = Supervisor(os.getpid(), this_process().start, url, port, systemd_stop())
        store.write_json(where / "supervisor.json", note._asdict())
        while not stopping:
            for name, command in commands.items():
                if stopping or alive(where, name, started.get(name)):
                    continue
                if name in started and name not in again:
                    code = started[name].returncode
                    print(f"{name} ended with {code}; it is started again", flush=True)
                    again[name] = time.monotonic() + AGAIN_SECONDS
                if again.get(name, 0) > time.monotonic():
                    continue
                if name == "server" and taken(port):
                    print(f"port {port} is taken by another program; waiting for it", flush=True)
                    again[name] = time.monotonic() + AGAIN_SECONDS
                elif name == "server" or (healthy(url) and (not port or alive(where, "server"))):
                    again.pop(name, None)
                    started[name] = service(name, command, where, env)
            time.sleep(0.5)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        # An `up` that comes now waits for our end, and starts another.
        store.write_json(where / "supervisor.json", note._replace(pid=0, start=0)._asdict())
        end_all(base_dir)
    return 0


def this_process() -> orphans.Process:
    return orphans.process(os.getpid()) or orphans.Process(os.getpid(), os.getppid(), 0)


def systemd_stop() -> str | None:
    """What stops us, if we are a unit's: `up` takes the variable away."""
    if "INVOCATION_ID" not in os.environ:
        return None
    user = " --user" if "MANAGERPID" in os.environ else ""  # only an account's own manager sets it
    return f"systemctl{user} stop nanochat"


def end_all(base_dir: Path) -> None:
    """End the services and the runs of deployments: each flow has its stage save before it goes."""
    where = folder(base_dir)
    end(where, "recovery")
    work = engines.stages(base_dir, engines.engines(base_dir))
    end(where, "worker")  # and with it the flow that it has started itself; others are found
    flows = engines.engines(base_dir)
    engines.end(flows, [*work, *engines.stages(base_dir, flows)])
    end(where, "server")


# A service holds a lock for as long as it lives, so that a new supervisor finds those of one that was killed.


def service(name: str, command: list[str], where: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    path = where / f"{name}.lock"
    with (where / f"{name}.log").open("ab") as out, path.open("a") as lock:
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
        lock.truncate(0)
        json.dump(orphans.process(process.pid), lock)
        return process


def alive(where: Path, name: str, process: "subprocess.Popen[bytes] | None" = None) -> bool:
    if process is not None:
        process.poll()  # so that a dead child does not stay a zombie
    with store.locked(where / f"{name}.lock", wait=False) as free:
        return not free


def holder(where: Path, name: str) -> int | None:
    """The process of a service, if it is still the one that was started."""
    try:
        noted = orphans.Process(*json.loads((where / f"{name}.lock").read_text()))
    except (OSError, ValueError, TypeError):  # there never was one, or it is being noted just now
        return None
    now = orphans.process(noted.pid)
    return now.pid if now is not None and now.start == noted.start else None


def end(where: Path, name: str) -> None:
    """Ask a service to end, and make it after half a minute."""
    for number, seconds in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
        told = False
        deadline = time.monotonic() + seconds
        while alive(where, name) and time.monotonic() < deadline:
            if not told and (pid := holder(where, name)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                told = True
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
