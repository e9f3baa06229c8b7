"""`nanochat join`: this machine's GPUs for a run that another machine leads."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nanochat_core.launch import environment, stop
from nanochat_core.nodes import ANSWER, called, heard

POLL_SECONDS = 2.0


def join(base_dir: Path, tell: Callable[[str], None]) -> None:
    """Answer each call with this machine's ranks, until interrupted; then they save and end."""
    log = base_dir / "nodes" / f"{socket.gethostname()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = ""
    while True:
        call = heard(base_dir)
        if call is None or call["id"] == done:
            time.sleep(POLL_SECONDS)
            continue
        stage = Path(call["job"]).parts[0]
        tell(f"at work on {stage} with {call['endpoint']}  (log: {log})")
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "nanochat_core.launch", str(base_dir / call["job"])],
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
