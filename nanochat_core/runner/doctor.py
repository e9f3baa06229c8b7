"""Whether this machine can carry a profile to its end: a line for each thing that may be wrong, and its cure.

A check goes from facts, read where `Edges` says, to a line; nothing here decides by itself where to look.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from nanochat_core.artifacts import store
from nanochat_core.artifacts.progress import count
from nanochat_core.machine import guard
from nanochat_core.machine.hardware import Gpu, Machine, gpus, memory, unified
from nanochat_core.machine.probes import SLEEP, Edges, Reached
from nanochat_core.machine.proxy import socks
from nanochat_core.runner.estimate import Need, needs, works
from nanochat_core.runner.plan import Plan, Verdict
from nanochat_core.sources.download import offline
from nanochat_core.sources.http import endpoint
from nanochat_core.sources.hub import HUB
from nanochat_core.stages import assets, chat_eval

BURN_SECONDS = 5.0
GB10_FAULT, GB10_FINE = 60e12, 85e12  # bf16 FLOP/s: good units hold 92 to 97, a power or heat fault 20 to 50
OTHERS_FAULT, OTHERS_FINE = 0.3, 0.5  # of the nominal peak
BAD_KERNEL = "6.17.0-1008"  # of DGX OS 7.4.0: panics that lose the driver (third-party forensics)
OLDEST_DRIVER = 580  # the first for CUDA 13
PTXAS = "usr/local/cuda/bin/ptxas"
SKEW_SECONDS = 300.0  # a clock further off than this fails TLS and muddles the report
PATIENCE_SECONDS, AGAIN_SECONDS = 600.0, 20.0  # for what a machine that starts up may not have yet
TOLD = {"speed", "memory", "disk", "clock"}  # a run under way is told of these and not ended by them
SLOW_WRITE, SLOW_SYNC = 100e6, 1.0  # bytes/s; s

State = Literal["ok", "warn", "fail"]


class Line(NamedTuple):
    """One finding: what it is about, how it stands, what was found and what to do about it."""

    name: str
    state: State
    found: str
    remedy: str = ""


class RequirementsNotMet(ValueError):
    """The machine cannot carry the profile; the message names every reason and its cure."""


class Examination(NamedTuple):
    """All that was found, and what the environment needs so that stages work."""

    lines: list[Line]
    env: dict[str, str]


def examine(
    plan: Plan, verdicts: Mapping[str, Verdict], edges: Edges | None = None, more: Iterable[Line] = ()
) -> Examination:
    """Every check that makes sense for this plan on this machine."""
    edges = edges or Edges()
    runtime, machine = plan.runtime, edges.machine
    found, why = gpus(machine)
    wants_gpu = runtime.device == "cuda" or (runtime.device == "auto" and bool(found))
    todo = [name for name, verdict in verdicts.items() if verdict.state != "hit"]
    need = needs(plan, verdicts)
    lines = []
    if wants_gpu or why:
        lines += [gpu_line(found, why, runtime.device, runtime.nproc), *driver_lines(found, machine)]
    env: dict[str, str] = {}
    if todo:
        tried, busy, env = attempt(plan, wants_gpu, edges)
        lines += torch_lines(tried, wants_gpu, env)
        lines.append(speed_line(tried, busy))
        if tried.get("integrated") and not unified(machine):
            env = env | {guard.INTEGRATED: "1"}
    shared = unified(machine) is not False or guard.INTEGRATED in env
    lines += memory_lines(memory(machine), shared, bool(found), need)
    lines += suspend_lines(machine, edges.which)
    lines += update_lines(machine)
    lines.append(disk_line(need, edges.free(runtime.base_dir), runtime.base_dir))
    lines.append(write_line(edges, runtime.base_dir))
    hosts = wanted_hosts(plan, verdicts)
    answers = {host: edges.reach(f"https://{host}/") for host in hosts if not offline()}
    lines += network_lines(hosts, answers, offline())
    lines += proxy_lines(hosts, edges.env)
    lines.append(clock_line(machine, [a.clock for a in answers.values() if a.clock is not None], time.time()))
    lines += sandbox_lines(plan, todo)
    return Examination([*lines, *more], env)


def preflight(
    plan: Plan,
    verdicts: Mapping[str, Verdict],
    say: Callable[[str], object],
    edges: Edges | None = None,
    patience: float = PATIENCE_SECONDS,
) -> list[Line]:
    """Before any long work: tell what is doubtful, and end the run over what is broken. Sets the environment
    that stages need.

    A run under way is one that goes on after a power cut, with nobody there: it waits for what may come yet,
    a driver or a disk, and ends only over what no stage can do without.
    """
    going = under_way(plan, verdicts)
    deadline = time.monotonic() + (patience if going else 0.0)
    while True:
        found = examine(plan, verdicts, edges)
        lines = [judged(line, going) for line in found.lines]
        broken = [line for line in lines if line.state == "fail"]
        if not broken or time.monotonic() >= deadline:
            break
        say(f"{'; '.join(f'{line.name}: {line.found}' for line in broken)}; looking again in a moment")
        time.sleep(min(AGAIN_SECONDS, patience))
    os.environ.update(found.env)
    for line in lines:
        if line.state != "ok":
            say(f"{line.name}: {line.found}; {line.remedy}" if line.remedy else f"{line.name}: {line.found}")
    if broken:
        each = "; ".join(f"{line.name}: {line.found} ({line.remedy})" for line in broken)
        raise RequirementsNotMet(
            f"this machine cannot carry {plan.profile}: {each}. All of it: nanochat doctor {plan.profile}"
        )
    return lines


def under_way(plan: Plan, verdicts: Mapping[str, Verdict]) -> bool:
    """Whether a model of this plan has begun to be trained."""
    return any("params" in plan.facts(row) and verdict.state != "run" for row, verdict in verdicts.items())


def judged(line: Line, going: bool) -> Line:
    """A line as a run takes it. Downloads wait for the network by themselves: after a power cut the router
    may be up after this machine."""
    told = line.name == "network" or (going and line.name in TOLD)
    return line._replace(state="warn") if told and line.state == "fail" else line


# The checks: facts in, lines out.


def gpu_line(found: list[Gpu], why: str, device: str, wanted: int) -> Line:
    if found and (len(found) >= wanted or device == "auto"):
        each = "; ".join(f"{gpu.name}, capability {gpu.capability}" for gpu in found)
        return Line("GPU", "ok", f"{each}{why and f'; the driver says: {why}'}")
    if found:
        return Line(
            "GPU",
            "fail",
            f"{len(found)} of the {wanted} that the profile wants{why and f'; the driver says: {why}'}",
            f"--set runtime.nproc={len(found)}",
        )
    remedy = "reboot; if that does not help: sudo apt install --reinstall nvidia-driver-580-open"
    if not why:
        why, remedy = (
            "there is no NVIDIA driver",
            "choose a profile for this machine, or --set runtime.device=cpu",
        )
    return Line("GPU", "fail" if device == "cuda" else "warn", why, remedy)


def driver_lines(found: list[Gpu], machine: Machine) -> list[Line]:
    kernel = machine.text("proc/sys/kernel/osrelease")
    lines = []
    for driver in sorted({gpu.driver for gpu in found}):
        major = driver.split(".")[0]
        old = not major.isdigit() or int(major) < OLDEST_DRIVER
        lines.append(
            Line(
                "driver",
                "warn",
                f"{driver}, made before CUDA 13",
                "update it: sudo apt full-upgrade, then reboot",
            )
            if old
            else Line("driver", "ok", f"{driver}, kernel {kernel}")
        )
    if found and kernel.startswith(BAD_KERNEL):
        lines.append(
            Line(
                "kernel",
                "warn",
                f"{kernel} is known to panic and lose the driver",
                "update DGX OS and reboot",
            )
        )
    return lines


def attempt(plan: Plan, wants_gpu: bool, edges: Edges) -> tuple[dict[str, Any], bool, dict[str, str]]:
    """Try torch out, and once more with the system's ptxas if compiling failed for want of a newer one; not
    beside a stage at work, which would be in the way of both."""
    device = "cuda" if wants_gpu else "cpu"
    with contextlib.ExitStack() as stack:
        try:
            lock = store.locked(plan.runtime.base_dir / "locks" / "device.lock", wait=False)
            free = stack.enter_context(lock)
        except OSError:  # nothing can be written there, of which another line tells
            free = True
        options: dict[str, Any] = {"device": device, "compile": plan.runtime.compile}
        tried = edges.trial(**options, burn=(BURN_SECONDS if wants_gpu else 1.0) if free else 0.0)
        ptxas = edges.machine.root / PTXAS
        failed = wants_gpu and "error" not in tried and tried.get("compile", "ok") != "ok"
        if failed and "TRITON_PTXAS_PATH" not in edges.env and ptxas.exists():
            env = {"TRITON_PTXAS_PATH": str(ptxas)}
            again = edges.trial(**options, burn=0.0, env=env)
            if again.get("compile") == "ok":
                return tried | {"compile": "ok"}, not free, env
        return tried, not free, {}


def torch_lines(tried: Mapping[str, Any], wants_gpu: bool, env: Mapping[str, str]) -> list[Line]:
    if "error" in tried:
        return [
            Line("torch", "fail", str(tried["error"]), "see: python -m nanochat_core.machine.trial --compile")
        ]
    words = f"{tried['torch']}, computes in {tried['dtype']}"
    if wants_gpu and tried["device"] != "cuda":
        built = f"built for CUDA {tried['cuda']}" if tried["cuda"] else "built without CUDA"
        remedy = "look at: nvidia-smi; a reboot loads the driver that is installed"
        if not tried["cuda"] or int(tried["cuda"].split(".")[0]) < 13:
            remedy = f"uv sync brings a build with CUDA 13; then {remedy}"
        lines = [Line("torch", "fail", f"{tried['torch']}, {built}, sees no GPU", remedy)]
    elif (
        wants_gpu and tried["cuda"] and int(tried["cuda"].split(".")[0]) < 13 and tried["capability"] >= "12"
    ):
        remedy = "uv sync brings CUDA 13, which others measured 2.9 times faster on a Spark"
        lines = [Line("torch", "warn", f"{words}, CUDA {tried['cuda']}", remedy)]
    else:
        lines = [Line("torch", "ok", words + (f", CUDA {tried['cuda']}" if wants_gpu else ""))]
    compiled = tried.get("compile")
    if compiled == "ok":
        note = (
            f"works with {' '.join(f'{k}={v}' for k, v in env.items())}, which a run sets" if env else "works"
        )
        lines.append(Line("compiler", "ok", note))
    elif compiled:
        remedy = (
            "sudo apt install gcc python3-dev cuda-toolkit-13-0; if ptxas is what fails: export "
            f"TRITON_PTXAS_PATH=/{PTXAS}"
            if wants_gpu
            else "install a C++ compiler (apt install g++), or --set runtime.compile=false"
        )
        lines.append(Line("compiler", "fail", compiled, remedy))
    return lines


def speed_line(tried: Mapping[str, Any], busy: bool) -> Line:
    if busy:
        return Line("speed", "ok", "not measured: a stage is at work on this device")
    rate, peak = tried.get("flops"), tried.get("peak")
    if not rate:
        return Line("speed", "warn", "not measured: torch does not work here")
    words = f"{count(rate)}FLOP/s in matrix products"
    if tried["device"] == "cpu":
        return Line("speed", "ok", words)
    if not peak:
        return Line("speed", "ok", f"{words}; this GPU's peak is not in the table")
    spark = "GB10" in tried["name"]
    fault, fine = (GB10_FAULT, GB10_FINE) if spark else (OTHERS_FAULT * peak, OTHERS_FINE * peak)
    words += f", {100 * rate / peak:.0f}% of nominal"
    if rate >= fine:
        return Line("speed", "ok", words)
    remedy = "look at clocks and heat: nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE"
    if spark:
        remedy = (
            "a power or heat fault: take the power brick off the wall and the box for a minute, give it air, "
            "use its own brick; if it stays so, the unit is to be replaced"
        )
    return Line("speed", "fail" if rate < fault else "warn", words, remedy)


def memory_lines(found: Any, shared: bool, cards: bool, need: Need) -> list[Line]:
    if found is None:
        return [Line("memory", "warn", "this system does not say how much is free")]
    words = f"{found.available / 2**30:.1f} of {found.total / 2**30:.1f} GiB available"
    least = need.memory if shared or not cards else 0
    if found.available < least:
        state: State = "fail"
        remedy = f"training alone takes {least / 2**30:.0f} GiB: end other programs, or a smaller depth"
    elif found.available < 0.8 * found.total and shared:
        state, remedy = (
            "warn",
            "end what holds memory; then: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches",
        )
    elif found.available < guard.OWN.stop * found.total * 2:
        state, remedy = "warn", "end other programs: a stage is stopped when memory runs out"
    else:
        state, remedy = "ok", ""
    lines = [Line("memory", state, words, remedy)]
    if shared and found.swap:
        remedy = (
            "sudo swapoff -a, and take it out of /etc/fstab: a box that swaps its GPU's memory stands still"
        )
        lines.append(Line("swap", "warn", f"{found.swap / 2**30:.1f} GiB", remedy))
    elif shared or found.swap:
        lines.append(Line("swap", "ok", f"{found.swap / 2**30:.1f} GiB" if found.swap else "off"))
    return lines


def suspend_lines(machine: Machine, which: Callable[[str], str | None]) -> list[Line]:
    """A desktop's habit of sleeping ends a run of days; only a system run by systemd is asked."""
    if not (machine.root / "run/systemd/system").exists() or not which("systemctl"):
        return []
    states = machine.ask(["systemctl", "is-enabled", *SLEEP]).out.split()
    if states and all(state == "masked" for state in states):
        return [Line("suspend", "ok", "masked")]
    return [Line("suspend", "warn", "this machine may go to sleep", f"sudo systemctl mask {' '.join(SLEEP)}")]


def update_lines(machine: Machine) -> list[Line]:
    """What may replace the driver under a run, or has done so already."""
    lines = []
    pending = [
        path for path in ("run/reboot-required", "var/run/reboot-required") if (machine.root / path).exists()
    ]
    if pending:
        packages = " ".join(machine.text(f"{pending[0]}.pkgs").split()[:4])
        words = f"pending{packages and f', for {packages}'}"
        lines.append(Line("reboot", "warn", words, "reboot before a run of days: sudo reboot"))
    files = sorted((machine.root / "etc/apt/apt.conf.d").glob("*"))
    settings = "\n".join(machine.text(str(path.relative_to(machine.root))) for path in files)
    upgrades = re.findall(r"^\s*(?:APT::Periodic::)?Unattended-Upgrade\s+\"?(\w+)", settings, re.MULTILINE)
    if not upgrades:
        return lines
    timer = "apt-daily-upgrade.timer"
    if upgrades[-1] == "0" or machine.ask(["systemctl", "is-enabled", timer]).out in ("masked", "disabled"):
        return [*lines, Line("updates", "ok", "unattended upgrades are off")]
    reboots = re.search(r"^\s*Unattended-Upgrade::Automatic-Reboot\s+\"true\"", settings, re.MULTILINE)
    words = "unattended upgrades may replace the driver under a run"
    words += " and reboot this machine" if reboots else ""
    return [
        *lines,
        Line(
            "updates",
            "warn",
            words,
            f"until the run is over: sudo systemctl disable --now unattended-upgrades {timer}",
        ),
    ]


def disk_line(need: Need, free: int, base_dir: Path) -> Line:
    words = f"{count(free)}B free, {count(need.disk)}B still needed at the fullest, on the disk of {base_dir}"
    if free < need.disk:
        return Line("disk", "fail", words, "free some space (nanochat gc), or choose another --base-dir")
    if free < 1.2 * need.disk:
        return Line(
            "disk", "warn", words, "that is less than a fifth to spare: nanochat gc frees what is unused"
        )
    return Line("disk", "ok", words)


def write_line(edges: Edges, base_dir: Path) -> Line:
    try:
        rate, sync = edges.probe(base_dir)
    except OSError as error:
        return Line(
            "writing",
            "fail",
            f"nothing can be written in {base_dir}: {error.strerror}",
            "choose another --base-dir",
        )
    words = f"{count(rate)}B/s, {1000 * sync:.0f} ms to make a record safe"
    slow = rate < SLOW_WRITE or sync > SLOW_SYNC
    return Line(
        "writing",
        "warn" if slow else "ok",
        words,
        "checkpoints will take long; a local NVMe disk is meant" if slow else "",
    )


def wanted_hosts(plan: Plan, verdicts: Mapping[str, Verdict]) -> list[str]:
    """The hosts that rows still to be made will download from."""
    hosts: dict[str, None] = {}
    for name, job in plan.jobs.items():
        if not works(verdicts[name]):
            continue
        source = getattr(job.config, "source", None)
        if isinstance(job.config, assets.Config) and source == "hub":
            urls = [
                job.config.bundle_url,
                job.config.identity_url,
                job.config.words_url,
                endpoint(),
            ]
        elif isinstance(source, str) and source in HUB:
            urls = [HUB[source].url(0, "main")]
        else:
            listed = [source] if isinstance(source, str) else list(source or ())
            urls = [url for url in listed if url.startswith(("http://", "https://"))]
        hosts |= {urlsplit(url).netloc: None for url in urls}
    return list(hosts)


def network_lines(hosts: list[str], answers: Mapping[str, Reached], offline: bool) -> list[Line]:
    if not hosts:
        return []
    if offline:
        words = f"NANOCHAT_OFFLINE is set; what {', '.join(hosts)} would give must lie in downloads/"
        return [Line("network", "warn", words, "unset it, or bring the files by hand")]
    away = {host: answer.error for host, answer in answers.items() if answer.error}
    if not away:
        return [Line("network", "ok", f"{', '.join(hosts)} answers")]
    words = "; ".join(f"{host} does not answer ({error})" for host, error in away.items())
    remedy = "connect this machine (https_proxy names a proxy), or bring the files and set NANOCHAT_OFFLINE=1"
    return [Line("network", "fail", words, remedy)]


def proxy_lines(hosts: list[str], env: Mapping[str, str]) -> list[Line]:
    """A SOCKS proxy serves Prefect and the hub's library; our own downloads go by HTTP proxies only."""
    named = [name for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY") if env.get(name)]
    if not hosts or not named or not socks(env[named[0]]):
        return []
    words = f"{named[0]} names a SOCKS proxy, which downloads do not use"
    return [Line("proxy", "warn", words, "set https_proxy to an HTTP proxy (http://HOST:PORT)")]


def clock_line(machine: Machine, clocks: list[float], now: float) -> Line:
    off = [abs(clock - now) for clock in clocks]
    if off and min(off) > SKEW_SECONDS:
        return Line(
            "clock", "fail", f"it is {min(off) / 60:.0f} minutes off", "sudo timedatectl set-ntp true"
        )
    said = machine.ask(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if said.code == 0 and said.out == "yes":
        return Line("clock", "ok", "synchronised")
    if off:
        return Line("clock", "ok", f"within {min(off):.0f} s of the net's")
    if said.code == 0 and said.out == "no":
        return Line("clock", "warn", "not synchronised", "sudo timedatectl set-ntp true")
    return Line("clock", "ok", "set by whoever runs this machine; it could not be compared")


def sandbox_lines(plan: Plan, todo: list[str]) -> list[Line]:
    """Programs of the model run only behind walls; better to know before the days of training."""
    asked = [
        row
        for row in todo
        if isinstance(plan.jobs[row].config, chat_eval.Config) and "humaneval" in plan.jobs[row].config.tasks
    ]
    if not asked:
        return []
    from nanochat_core.infer.sandbox import NoSandbox, available

    try:
        if available() == "bubblewrap":
            return [Line("sandbox", "ok", "bubblewrap works, for HumanEval")]
        words = "bubblewrap is missing, or may not make namespaces"
    except NoSandbox as error:
        words = str(error)
    remedy = (
        "sudo apt install bubblewrap; on Ubuntu 24.04 also an AppArmor profile for it (docs/dgx-spark.md)"
    )
    return [
        Line("sandbox", "fail", words, f"{remedy}; or leave humaneval out of the tasks of {', '.join(asked)}")
    ]
