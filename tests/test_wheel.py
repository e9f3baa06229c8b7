"""The wheel in a clean virtual environment, used in a folder whose own modules must never be imported."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from importlib.metadata import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[1]
LOCAL = ("flows", "nanochat_core", "prefect", "torch", "uvicorn")
TRAP = "import pathlib; pathlib.Path(__file__).with_name('imported').touch(); raise ImportError(__file__)"


class Installed(NamedTuple):
    """A wheel, and the virtual environment and working directory that it is used from."""

    wheel: Path
    venv: Path
    folder: Path

    def run(self, *words: str) -> str:
        """A command of the virtual environment, with nothing of this process's environment but PATH."""
        home = self.folder.parent / "home"
        env = {"PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}", "HOME": str(home), "OMP_NUM_THREADS": "1"}
        command = [str(self.venv / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(self.folder.rglob("imported")) == []
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    top = tmp_path_factory.mktemp("wheel")
    venv, python, locked = top / "venv", top / "venv" / "bin" / "python", top / "locked.txt"

    def uv(*words: str | Path) -> None:
        done = subprocess.run(["uv", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    uv("build", "--wheel", "--out-dir", top)
    (wheel,) = top.glob("*.whl")
    uv("venv", "--python", sys.executable, venv)
    scope = ("--no-dev", "--extra", "demo", "--no-emit-workspace", "--no-hashes")
    uv("export", "--frozen", *scope, "--output-file", locked)
    uv("pip", "install", "--python", python, "--no-deps", "--requirement", locked, wheel)
    (site,) = venv.glob("lib/python*/site-packages")
    for file in files("nanochat-bpe") or []:  # as it is installed here: to build it again takes a minute
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.locate(), site / file)
    uv("pip", "check", "--python", python)

    folder = top / "folder"
    for name in LOCAL:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(TRAP)
    (top / "home").mkdir()
    return Installed(wheel, venv, folder)


def test_the_wheel_holds_the_deployments_the_unit_the_profiles_and_the_page(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = set(wheel.namelist())
    data = [path.relative_to(ROOT) for path in (ROOT / "deployments").rglob("*") if path.is_file()]
    assert {f"nanochat_core/{path}" for path in data} <= held
    assert {"nanochat_core/deployments/nanochat.service", "nanochat_core/chat/ui.html"} <= held
    profiles = {str(path.relative_to(ROOT)) for path in ROOT.glob("nanochat_core/profiles/*.toml")}
    assert profiles and profiles <= held
    assert {name.split("/")[0].partition("-")[0] for name in held} == {
        "flows",
        "nanochat_core",
        "nanochat_flow",
    }


def test_run_install_services_and_up_use_what_is_installed(installed: Installed) -> None:
    """In one test: `run` compiles what `up` imports, and makes the database that its server opens."""
    assert "Usage: nanochat" in installed.run("nanochat", "--help")
    assert "pretrain" in installed.run("nanochat", "plan", "tiny")
    assert Path(installed.run("nanochat", "run", "tiny").split()[-1]).name == "report.md"
    unit = installed.run("nanochat", "install-services", "--dry-run", "--user-name", "ada")
    assert f"ExecStart={installed.venv / 'bin' / 'python'} -P -m flows.services" in unit

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"

    def ask(path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = Request(f"{api}/{path}", body, headers={"content-type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        installed.run("nanochat", "up", "--port", str(port))
        deployment = ask("deployments/name/speedrun/tiny")["id"]
        parameters = {"until": "tokenizer", "overrides": ["tokenizer.vocab_size=600"]}
        run = ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]
        deadline = time.monotonic() + 300
        while (state := ask(f"flow_runs/{run}")["state"])["type"] in ("SCHEDULED", "PENDING", "RUNNING"):
            assert time.monotonic() < deadline, state
            time.sleep(1)
        assert state["type"] == "COMPLETED", state
    finally:
        ended = installed.run("nanochat", "down")
    assert "down: recovery, worker, server" in ended
