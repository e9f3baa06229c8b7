"""The services in systemd: what is installed is valid, shown before it is done, and brings a run back."""

import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from test_services import Machine, until
from toys import Command

from nanochat_core.cli.options import usable
from nanochat_core.machine import systemd
from nanochat_core.machine.installed import module
from nanochat_core.machine.systemd import InstallStep


def settings(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


@pytest.mark.parametrize("system", [False, True])
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, system: bool) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    path = tmp_path / "nanochat.service"
    path.write_text(systemd.unit(tmp_path / "a base", 4200, system=system, user="root"))
    mode = [] if system else ["--user"]
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    words = ["systemd-analyze", *mode, "verify", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and str(path) not in done.stderr, done.stderr
    assert "@" not in path.read_text().partition("[Unit]")[2]


def test_the_unit_names_this_python_and_survives_all_it_can() -> None:
    text = systemd.unit(Path("/srv/base"), 4242, system=True, user="ada")
    (command,) = settings(text, "ExecStart")
    api = "http://127.0.0.1:4242/api"
    assert shlex.split(command) == module("flows.services", "/srv/base", api, "4242")
    assert settings(text, "User") == ["ada"] and settings(text, "WantedBy") == ["multi-user.target"]
    assert settings(text, "Restart") == ["always"] and settings(text, "StartLimitIntervalSec") == ["0"]
    assert settings(systemd.unit(Path("/b"), 1, system=False, user="ada"), "User") == []
    with pytest.raises(ValueError, match="cannot stand in a systemd unit"):
        systemd.unit(Path("/srv/100%"), 4200, system=False, user="ada")


def test_a_dry_run_shows_everything_and_does_nothing(command: Command, tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    words = ["install-services", "--dry-run", "--user-name", "ada"]
    done = command(*words, env=env)
    assert done.returncode == 0, done.stderr
    unit = tmp_path / "systemd" / "user" / "nanochat.service"
    for said in (
        f"write {unit}:",
        "Restart=always",
        "loginctl enable-linger ada",
        "enable --now nanochat.service",
    ):
        assert said in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = command(*words, "--system", env=env)
    assert "systemctl mask sleep.target" in done.stdout and "runuser -u ada" in done.stdout


def test_a_dry_run_for_the_machine_names_who_really_runs_it_and_their_home(command: Command) -> None:
    nobody = pwd.getpwnam("nobody")
    words = ["install-services", "--dry-run", "--system"]
    unset = {"NANOCHAT_BASE_DIR": None}
    done = command(*words, env=unset | {"SUDO_USER": "nobody"})
    assert done.returncode == 0, done.stderr
    assert "User=nobody" in done.stdout and "runuser -u nobody" in done.stdout
    assert f"NANOCHAT_BASE_DIR={nobody.pw_dir}/.cache/nanochat" in done.stdout  # not root's home
    done = command(*words, "--user-name", "n0body", env=unset)
    assert done.returncode == 2 and "there is no user n0body on this machine" in done.stderr


def test_the_machines_unit_waits_for_the_network_and_a_users_names_no_target_it_lacks() -> None:
    system = systemd.unit(Path("/b"), 1, system=True, user="ada")
    assert settings(system, "Wants") == ["network-online.target"]
    assert "network-online.target" in settings(system, "After")[0]
    assert settings(systemd.unit(Path("/b"), 1, system=False, user="ada"), "After") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes directories for others")
def test_what_root_makes_for_somebody_is_theirs() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which nobody else may enter
        top = Path(folder)
        top.chmod(0o755)
        base = top / "cache" / "nanochat"
        assert systemd.handed_over(base, "nobody", usable) == base
        assert base.owner() == base.parent.owner() == "nobody" and top.owner() == "root"
        (top / "roots").mkdir(0o755)
        with pytest.raises(ValueError, match=r"nobody cannot write to .*/roots: chown it"):
            systemd.handed_over(top / "roots", "nobody", usable)


def test_steps_are_done_in_order_and_the_first_that_fails_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    note = tmp_path / "note"
    done = [
        InstallStep("a file", tmp_path / "deep" / "unit", "text"),
        InstallStep("a command", command=("touch", str(note))),
    ]
    systemd.install(done, said.append)
    assert (tmp_path / "deep" / "unit").read_text() == "text" and note.exists()
    assert said[0] == "# a file" and shlex.join(["touch", str(note)]) in said
    with pytest.raises(ValueError, match=r"No such file.*put that right and run this again"):
        systemd.install([InstallStep("fails", command=("cat", str(tmp_path / "none")))], said.append)
    with pytest.raises(ValueError, match="there is no frobnicatectl here; without systemd call nanochat up"):
        systemd.install([InstallStep("is not there", command=("frobnicatectl",))], said.append)


def test_the_services_do_not_run_as_root_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="installed by root"):
        systemd.whom(True, "ada")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(systemd.getpass, "getuser", lambda: "root")
    monkeypatch.delenv("SUDO_USER", raising=False)
    with pytest.raises(ValueError, match="should not run as root"):
        systemd.whom(True, None)
    monkeypatch.setenv("SUDO_USER", "ada")
    assert systemd.whom(True, None) == "ada" and systemd.whom(False, "root") == "root"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_units_command_run_by_hand_brings_an_interrupted_run_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    text = systemd.unit(machine.base, machine.port, system=False, user="ada")
    (command,) = settings(text, "ExecStart")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")}
    env |= dict(word.split("=", 1) for line in settings(text, "Environment") for word in shlex.split(line))

    def start() -> "subprocess.Popen[bytes]":
        """As systemd does: the unit's command and environment, in the user's home, and nothing of ours."""
        return subprocess.Popen(shlex.split(command), cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)

    machine.base.mkdir()
    try:
        with start() as first:
            machine.up()  # finds the unit's services there, and registers the deployments
            run = machine.start("pretrain.steps=400")
            until(lambda: machine.step() >= 40, 120)
            for process in machine.processes():
                process.send_signal(signal.SIGKILL)
            first.wait(20)
        reached = machine.step()
        with start() as second:
            until(lambda: machine.step() > reached, 200)
            second.send_signal(signal.SIGTERM)  # systemctl stop: in order, with a checkpoint
            second.wait(200)
        (attempts,) = machine.base.glob("pretrain/*/attempts.jsonl")
        events = [json.loads(line)["event"] for line in attempts.read_text().splitlines()]
        assert events[:2] == ["started", "started"] and machine.state and run
    finally:
        for process in machine.processes():
            process.kill()
        time.sleep(0.1)
