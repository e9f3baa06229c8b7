"""Which Prefect server is spoken to: the one configured, the one that `nanochat up` keeps for this base
directory, or else, for a run started by hand, an embedded one that lives exactly as long as the run.

Prefect's own ephemeral server shares our process group, so that Ctrl-C ends it before the run could tell it
anything; and it outlives a run that is killed. Ours has a session of its own, dies with its parent, and
serves the UI.
"""

import atexit
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.orphans import process as process_now
from nanochat_core.machine.installed import module
from nanochat_core.machine.proxy import direct, local, opener
from nanochat_core.runner.launch import die_with_parent
from nanochat_core.runner.status import at_work

STARTUP_SECONDS = 120.0  # a fresh database on a slow disk takes 20
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows our own lines
}


def configured() -> str | None:
    """The API that the environment, or the user's active Prefect profile, names."""
    if os.environ.get("PREFECT_API_URL"):
        return os.environ["PREFECT_API_URL"]
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    try:
        profiles = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None


class Supervisor(NamedTuple):
    """What the supervisor of a base directory notes of itself; the note outlives it."""

    pid: int
    start: int  # in ticks since boot: a number that is given again is another process
    url: str
    port: int  # of its own server; 0 if it uses one that is somewhere else
    systemd: str | None  # the command that stops it, if it is a unit's

    def lives(self) -> bool:
        now = process_now(self.pid)
        return now is not None and now.start == self.start


def services_folder(base_dir: Path) -> Path:
    return base_dir / "prefect" / "services"


def last_supervisor(base_dir: Path) -> Supervisor | None:
    """The supervisor that was here last, alive or not; None if there was none, or its note cannot be read."""
    try:
        return Supervisor(**json.loads((services_folder(base_dir) / "supervisor.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def supervised(base_dir: Path) -> Supervisor | None:
    """The supervisor at work here, if there is one."""
    last = last_supervisor(base_dir)
    if last is None or not last.lives():
        return None
    return last if at_work(services_folder(base_dir) / "supervisor.lock") else None


def same(one: str, other: str) -> bool:
    """Whether two addresses are of one server, however this machine is called in them."""
    a, b = urllib.parse.urlsplit(one), urllib.parse.urlsplit(other)
    return (a.port, local(one) or a.hostname) == (b.port, local(other) or b.hostname)


def address(base_dir: Path) -> str | None:
    """The API to speak to; None if there is none yet. The one configured may be the one that `up` advised to
    export: it counts for as long as `up` keeps it."""
    named, last = configured(), last_supervisor(base_dir)
    ours = last is not None and last.port > 0 and named is not None and same(named, last.url)
    if named is not None and not ours:
        return named
    now = supervised(base_dir)
    return now.url if now is not None else None


def prepare(base_dir: Path) -> str:
    """Settle what Prefect must know before its import, and start a server if there is none; its API's
    address.

    The server ends when this process does: registered before Prefect's own last words, so after them.
    """
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    os.environ.update(direct(os.environ))
    share_password()
    url = address(base_dir)
    if url:
        now = supervised(base_dir)
        ours = now is not None and now.port > 0 and now.url == url
        deadline = time.monotonic() + (STARTUP_SECONDS if ours else 0)  # `up` may be starting it just now
        while not healthy(url):
            if time.monotonic() > deadline:
                what = "see nanochat doctor" if ours else "start it, or unset PREFECT_API_URL"
                raise ConnectionError(f"the Prefect server at {url} does not answer; {what}")
            time.sleep(0.5)
        os.environ["PREFECT_API_URL"] = url
        return url
    folder = base_dir / "prefect"
    folder.mkdir(exist_ok=True)
    if not os.access(Path.home(), os.W_OK):
        os.environ.setdefault("PREFECT_HOME", str(folder))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = folder / "server.log"
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    with store.locked(home / "nanochat.lock"):  # two that start at once would both make the database's tables
        with log.open("wb") as out:
            process = subprocess.Popen(
                module("flows.server", str(port)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"NANOCHAT_PARENT": str(os.getpid())},
            )
        atexit.register(end, process)
        deadline = time.monotonic() + STARTUP_SECONDS
        while not healthy(os.environ["PREFECT_API_URL"]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the embedded Prefect server did not start; its log: {log}")
            time.sleep(0.2)
    return os.environ["PREFECT_API_URL"]


def share_password() -> None:
    """A server that asks for a password (PREFECT_SERVER_API_AUTH_STRING) is asked with the same one."""
    if os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        os.environ.setdefault("PREFECT_API_AUTH_STRING", os.environ["PREFECT_SERVER_API_AUTH_STRING"])


def healthy(url: str) -> bool:
    try:
        with opener(url).open(f"{url}/health", timeout=5) as answer:
            return json.load(answer) is True
    except urllib.error.HTTPError as refused:
        return refused.code in (401, 403)  # it is there, and wants a key
    except (OSError, ValueError, http.client.HTTPException):  # nobody, or not a Prefect server
        return False


def ask(url: str, path: str, content: Any = None) -> Any:
    """A question to the API without Prefect's client, whose import alone takes seconds."""
    headers = {"content-type": "application/json"}
    password = os.environ.get("PREFECT_API_AUTH_STRING")
    if password:
        headers["authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    body = None if content is None else json.dumps(content).encode()
    asked = urllib.request.Request(f"{url}/{path}", body, headers)
    with opener(url).open(asked, timeout=5) as answer:
        return json.load(answer)


def end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(port: int) -> None:
    die_with_parent()
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(ephemeral=True, final=True), host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main(int(sys.argv[1]))
