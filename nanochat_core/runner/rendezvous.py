"""One training stage on several machines: torchrun's c10d rendezvous, and how the others hear of it.

The machines share one base directory (NFS). The first, where the run is, leaves a call there and hosts the
rendezvous; each other one (`nanochat join`) answers whatever is called, stage after stage, until it is told
to stop. Which machine gets rank 0 is torchrun's affair.
"""

import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Runtime
from nanochat_core.runner.exits import LOST

PORT = 29400
JOIN_SECONDS = 24 * 3600  # how long the machines that are there wait for one that is not
STOPPED = re.compile(r"\s*exitcode\s*: 130\b")  # torchrun's report of a rank that was told to stop
ANSWER = "NANOCHAT_ANSWER"  # set in a process that answers a call rather than making one


def call_path(base_dir: Path) -> Path:
    return base_dir / "locks" / "call.json"


def endpoint(runtime: Runtime) -> str:
    """HOST:PORT where the machines of a run meet."""
    return runtime.rendezvous or f"{socket.gethostname()}:{PORT}"


def refuse_loopback(runtime: Runtime) -> None:
    """A name that leads back to this machine is refused before any work: the others would never arrive, and
    Ubuntu's /etc/hosts gives a machine's own name 127.0.1.1. A loopback address that is written as one is
    meant (all "machines" are this one)."""
    host = endpoint(runtime).rpartition(":")[0]
    if runtime.nnodes == 1 or is_address(host):
        return
    remedy = "set runtime.rendezvous=ADDRESS:PORT to one of its own that the others reach"
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError as error:
        raise ValueError(
            f"the machines cannot meet at {host}, which has no address here ({error}); {remedy}"
        ) from None
    if any(ipaddress.ip_address(one).is_loopback for one in found):
        raise ValueError(
            f"the machines cannot meet at {host}, which is {min(found)}: this machine to itself; {remedy}"
        )


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def torchrun(job: Path, runtime: Runtime) -> list[str]:
    """The words after `torchrun` for this machine's part of a stage; the first machine also calls the
    others."""
    local = [f"--nproc-per-node={runtime.nproc}"]
    if runtime.nnodes == 1:
        return ["--standalone", *local]
    answering = os.environ.get(ANSWER)
    if answering:
        call = json.loads(answering)
    else:
        call = {
            "format": store.FORMAT,
            "base_dir": str(runtime.base_dir),
            "job": str(job.relative_to(runtime.base_dir)),
            "endpoint": endpoint(runtime),
            "id": f"{job.parent.parent.name}-{job.parent.name}-{time.time_ns()}",  # each attempt has its own
        }
        store.write_json(call_path(runtime.base_dir), call)
    host = call["endpoint"].rpartition(":")[0]
    return [
        f"--nnodes={runtime.nnodes}",
        *local,
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={call['endpoint']}",
        f"--rdzv-id={call['id']}",
        f"--rdzv-conf=is_host={0 if answering else 1},join_timeout={JOIN_SECONDS}",
        f"--local-addr={address_towards(call['endpoint']) if answering else host}",  # no name service needed
        "--max-restarts=0",  # a new attempt is a new call: torchrun may count on a machine that is gone
    ]


def lost(lines: Iterable[str]) -> bool:
    """Whether a log says that the other machine went away: then the same stage is called again.

    A rank sees a closed connection, or torchrun sees first that the other's agent is gone and stops its
    ranks, which save and exit with 130.
    """
    return any(LOST.search(line) or STOPPED.match(line) for line in lines)


def address_towards(endpoint: str) -> str:
    """This machine's address on the network that leads to the endpoint."""
    host, _, port = endpoint.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # sends nothing: only asks for the route
        s.connect((host, int(port)))
        return str(s.getsockname()[0])


def called(base_dir: Path) -> dict[str, Any] | None:
    """The last call."""
    try:
        return dict(json.loads(call_path(base_dir).read_text()))
    except (OSError, ValueError):
        return None


def unanswered(base_dir: Path) -> dict[str, Any] | None:
    """The last call, if its stage is still to be made: where nobody answers at its rendezvous, somebody may
    be waiting in vain."""
    call = called(base_dir)
    if call is None:
        return None
    job = base_dir / call["job"]
    return call if job.exists() and not (job.parent / "result.json").exists() else None


def heard(base_dir: Path) -> dict[str, Any] | None:
    """The call that is being made at this moment: left in the base directory, and its rendezvous answers."""
    call = called(base_dir)
    if call is None:
        return None
    host, _, port = call["endpoint"].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            pass
    except OSError:
        return None
    if call["base_dir"] != str(base_dir.resolve()):
        raise ValueError(
            f"the run's base directory is {call['base_dir']} over there and {base_dir.resolve()} here; "
            "mount it at the same path on both machines"
        )
    return call
