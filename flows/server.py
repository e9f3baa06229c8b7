"""The embedded Prefect server of a run started by hand: a process that lives exactly as long as the run.

Prefect's own ephemeral server shares our process group, so that Ctrl-C ends it before the run could tell it
anything; and it outlives a run that is killed. Ours has a session of its own, dies with its parent, and
serves the UI.
"""

import atexit
import base64
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from nanochat_core import store
from nanochat_core.launch import die_with_parent

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


def prepare(base_dir: Path) -> str:
    """Settle what Prefect must know before its import, and start a server if none is set; its API's address.

    The server ends when this process does: registered before Prefect's own last words, so after them.
    """
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    share_password()
    url = configured()
    if url:
        if not healthy(url):
            raise ConnectionError(
                f"the Prefect server at {url} does not answer; start it, or unset PREFECT_API_URL"
            )
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
                [sys.executable, "-m", "flows.server", str(port)],
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
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as refused:
        return refused.code < 500  # it is there, and wants a key
    except (urllib.error.URLError, OSError):
        return False


def ask(url: str, path: str, content: Any = None) -> Any:
    """A question to the API without Prefect's client, whose import alone takes seconds."""
    headers = {"content-type": "application/json"}
    password = os.environ.get("PREFECT_API_AUTH_STRING")
    if password:
        headers["authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    body = None if content is None else json.dumps(content).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{path}", body, headers), timeout=5) as answer:
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
