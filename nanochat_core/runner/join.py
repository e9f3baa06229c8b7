"""`nanochat join`: this machine's GPUs for a run that another machine leads."""

import json
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nanochat_core.machine.installed import module
from nanochat_core.runner.launch import environment, stop
from nanochat_core.runner.rendezvous import ANSWER, called, heard, unanswered

POLL_SECONDS = 2.0
PATIENCE = 10  # looks at a call that nobody answers: a first machine that starts up takes some seconds


def join(base_dir: Path, tell: Callable[[str], None]) -> None:
    """Answer each call with this machine's ranks, until interrupted; then they save and end."""
    log = base_dir / "nodes" / f"{socket.gethostname()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = ""
    missed: Counter[str] = Counter()
    while True:
        call = heard(base_dir)
        if call is None and (silent := unanswered(base_dir)) is not None:
            missed[silent["id"]] += 1
            if missed[silent["id"]] == PATIENCE:
                tell(
                    f"a call names {silent['endpoint']}, which does not answer: if a run waits there, a "
                    "firewall is between, or that name is another machine's here; on the first machine set "
                    "runtime.rendezvous to an address of its own that this one reaches"
                )
        if call is None or call["id"] == done:
            time.sleep(POLL_SECONDS)
            continue
        stage = Path(call["job"]).parts[0]
        tell(f"at work on {stage} with {call['endpoint']}  (log: {log})")
        with log.open("ab") as out:
            process = subprocess.Popen(
                module("nanochat_core.runner.launch", str(base_dir / call["job"])),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment() | {ANSWER: json.dumps(call)},
            )
        try:  # a call that came too late was answered in vain, once there is another
            while process.poll() is None and called(base_dir) == call:
                time.sleep(POLL_SECONDS)
        finally:
            stop(process)
        code = process.wait()
        done = call["id"] if code == 0 else ""
        how = "is done" if code == 0 else f"ended here with code {code}"
        tell(f"{stage} {how}; waiting for the next call")
        time.sleep(POLL_SECONDS)
