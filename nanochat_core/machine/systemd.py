"""Puts the services into systemd: what is done is a list first, which can be read before it is done."""

import getpass
import os
import pwd
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat_core.machine.installed import deployment, module
from nanochat_core.machine.probes import SLEEP

SYSTEM = Path("/etc/systemd/system")
# A run's mirror and downloads want the network, and a router starts after the same power cut.
ORDER = "Wants=network-online.target\nAfter=network-online.target time-sync.target"


class InstallStep(NamedTuple):
    """A file to write, or a command to run."""

    why: str
    path: Path | None = None
    text: str = ""
    command: tuple[str, ...] = ()


def unit(base_dir: Path, port: int, *, system: bool, user: str) -> str:
    """The unit's text for this Python and this base directory."""
    url = f"http://127.0.0.1:{port}/api"
    command = module("flows.services", str(base_dir), url, str(port))
    for word in command:
        if any(sign in word for sign in '%"\\\n$'):
            raise ValueError(f"{word!r} cannot stand in a systemd unit; use a path without quotes, % and $")
    filled = {
        "@BASE@": str(base_dir),
        "@COMMAND@": " ".join(f'"{word}"' if " " in word else word for word in command),
        "@ORDER@": ORDER
        if system
        else "# a user's systemd knows no network target; what wants the network tries again",
        "@USER@": f"User={user}" if system else "# it runs as whoever installs it",
        "@TARGET@": "multi-user.target" if system else "default.target",
    }
    text = deployment("nanochat.service").read_text()
    for name, value in filled.items():
        text = text.replace(name, value)
    return text


def steps(base_dir: Path, port: int, *, system: bool, user: str) -> list[InstallStep]:
    """What an installation does, in order."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    folder = SYSTEM if system else config / "systemd" / "user"
    control = ("systemctl",) if system else ("systemctl", "--user")
    up = tuple(module("nanochat_core", "up", "--base-dir", str(base_dir), "--port", str(port)))
    found = [
        InstallStep("the unit", folder / "nanochat.service", unit(base_dir, port, system=system, user=user)),
        InstallStep("systemd reads it", command=(*control, "daemon-reload")),
    ]
    if system:
        found.append(InstallStep("the machine does not go to sleep", command=("systemctl", "mask", *SLEEP)))
        up = ("runuser", "-u", user, "--", *up)
    else:
        found.append(
            InstallStep(
                "it starts at boot, before anybody logs in", command=("loginctl", "enable-linger", user)
            )
        )
    found.append(
        InstallStep(
            "it starts now, and at every boot", command=(*control, "enable", "--now", "nanochat.service")
        )
    )
    found.append(InstallStep("a deployment for each profile", command=up))
    return found


def show(found: Sequence[InstallStep], say: Callable[[str], object]) -> None:
    for step in found:
        say(f"# {step.why}")
        if step.path is not None:
            say(f"write {step.path}:")
            for line in step.text.splitlines():
                say(f"    {line}")
        else:
            say(shlex.join(step.command))


def install(found: Sequence[InstallStep], say: Callable[[str], object]) -> None:
    """Do each step, shown as it is done; the first that fails ends it, with what it said."""
    for step in found:
        show([step], say)
        if step.path is not None:
            step.path.parent.mkdir(parents=True, exist_ok=True)
            part = step.path.with_name(f"{step.path.name}.part")
            part.write_text(step.text)
            part.replace(step.path)
            continue
        try:
            done = subprocess.run(step.command, capture_output=True, text=True, cwd="/")
        except FileNotFoundError:
            raise ValueError(
                f"there is no {step.command[0]} here; without systemd call nanochat up at boot"
            ) from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise ValueError(f"{shlex.join(step.command)}: {said[-1]}; put that right and run this again")


def whom(system: bool, user: str | None, *, only_show: bool = False) -> str:
    """Who the services run as; never root, unless that is asked for by name."""
    found = user or (os.environ.get("SUDO_USER") if system else None) or getpass.getuser()
    if system and os.geteuid() != 0 and not only_show:
        raise ValueError(
            "a system unit is installed by root (sudo, with this command's path); or leave --system out"
        )
    if found == "root" and user is None:
        raise ValueError(
            "the services should not run as root: name who they run as with --user-name, or say root there"
        )
    return found


def homed(base_dir: Path, user: str) -> Path:
    """The base directory with `~` as the user's home: root, who installs for somebody, has another."""
    if base_dir.parts[:1] != ("~",):
        return base_dir
    return Path(account(user).pw_dir).joinpath(*base_dir.parts[1:])


def handed_over(base_dir: Path, user: str, make: Callable[[Path], Path]) -> Path:
    """The base directory, made by `make`; what was not there before belongs to the user, not to root."""
    owner = account(user)
    new = [path for path in (base_dir, *base_dir.parents) if not path.exists()]
    made = make(base_dir)
    for path in new:
        os.chown(path, owner.pw_uid, owner.pw_gid)
    if subprocess.run(["runuser", "-u", user, "--", "test", "-w", str(made)]).returncode:
        raise ValueError(f"{user} cannot write to {made}: chown it, or choose another with --base-dir")
    return made


def account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise ValueError(f"there is no user {user} on this machine; name one with --user-name") from None
