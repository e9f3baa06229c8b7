"""Runs a program that a model wrote, where it can do no harm: for HumanEval and for rewards from code.

Each program gets a fresh interpreter (not a fork of this process) in namespaces of its own, made by
bubblewrap: no network, no processes but its own, a file system that holds Python and nothing else, which it
cannot write. In there it limits its own memory, time and files, and gives up by seccomp what starts
processes, opens sockets or looks into others. Without bubblewrap the walls around files are missing; that
is refused unless asked for.
"""

import contextlib
import functools
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

OUTPUT_BYTES = 1 << 20  # of a program's output; more ends in an error for the program
START_SECONDS = 10  # for the interpreter to be ready, before the program's own time begins
READY = b"ready\n"

Isolation = Literal["bubblewrap", "weaker"]


class Outcome(NamedTuple):
    """How a program ended; `error` is None if it ran to its end."""

    error: str | None
    stdout: str


class NoSandbox(ValueError):
    """This machine cannot isolate a program well enough."""


# What runs inside, before the program does. It has no imports of ours; the program comes on standard input.
# The filter is classic BPF: right architecture or death, then EPERM for each number on the list.
INSIDE = r"""
import ctypes, json, resource, struct, sys
want = json.loads(sys.stdin.readline())
program = sys.stdin.read()
hard = [("AS", want["memory"]), ("CPU", want["seconds"] + 1), ("FSIZE", want["output"])]
hard += [("CORE", 0), ("NOFILE", 32)]
for name, value in hard:
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
load, equal, give, allow, deny = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
code = [(load, 0, 0, 4), (equal, 1, 0, want["arch"]), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
code += [(0x35, 0, 1, 0x40000000), (give, 0, 0, deny)]  # the same calls under their x32 numbers
for number in want["denied"]:
    code += [(equal, 0, 1, number), (give, 0, 0, deny)]
code = b"".join(struct.pack("HBBI", *step) for step in code + [(give, 0, 0, allow)])
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
filled = Program(len(code) // 8, code)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(filled), 0, 0):
    sys.exit("no seccomp")
def finish(word=want["done"], write=sys.stderr.write):
    write(word)
del ctypes, json, resource, struct, libc, filled, code, want
sys.stdin = open(0, closefd=False)
print("ready", file=sys.stderr, flush=True)
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
finish()
"""

# fork vfork clone clone3 execve execveat ptrace socket socketpair kill tkill tgkill process_vm_readv
# process_vm_writev unshare setns mount bpf perf_event_open keyctl add_key request_key userfaultfd
# io_uring_setup pidfd_open pidfd_send_signal
X86 = (57, 58, 56, 435, 59, 322, 101, 41, 53, 62, 200, 234, 310, 311, 272, 308, 165, 321, 298, 250, 248, 249)
ARM = (220, 435, 221, 281, 117, 198, 199, 129, 130, 131, 270, 271, 97, 268, 40, 280, 241, 219, 217, 218)
BOTH = (425, 434, 424)
FILTERS = {
    "x86_64": (0xC000003E, (*X86, 323, *BOTH)),
    "aarch64": (0xC00000B7, (*ARM, 282, *BOTH)),
}


def run_program(
    program: str, *, seconds: float = 5.0, memory_mb: int = 512, allow_weaker: bool = False
) -> Outcome:
    """Run it to its end or to a limit. NoSandbox if this machine has no walls and weaker are not allowed."""
    isolation = available()
    if isolation == "weaker" and not allow_weaker:
        raise NoSandbox(
            "programs written by a model are not run here: bubblewrap is missing or may not make namespaces. "
            "Install it (apt install bubblewrap), or allow the weaker sandbox, in which they can read files"
        )
    return _run(program, seconds, memory_mb, isolation)


@functools.cache
def available() -> Isolation:
    """What this machine can do, found out by trying."""
    if sys.platform != "linux" or platform.machine() not in FILTERS:
        raise NoSandbox(f"there is no sandbox for {sys.platform} on {platform.machine()}")
    if shutil.which("bwrap") and _run("print(42)", 10, 512, "bubblewrap") == Outcome(None, "42\n"):
        return "bubblewrap"
    return "weaker"


def _run(program: str, seconds: float, memory_mb: int, isolation: Isolation) -> Outcome:
    arch, denied = FILTERS[platform.machine()]
    done = secrets.token_hex(
        8
    )  # said at the very end: a program that leaves early does not pass for a whole one
    limits = {
        "memory": memory_mb << 20,
        "seconds": int(seconds) + 1,
        "output": OUTPUT_BYTES,
        "arch": arch,
        "denied": denied,
        "done": done,
    }
    text = json.dumps(limits) + "\n" + program
    python = [str(Path(sys.executable).resolve()), "-I", "-S", "-c", INSIDE]
    command = [*_walls(), *python] if isolation == "bubblewrap" else python
    with contextlib.ExitStack() as files:
        stdin, stdout, stderr = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        stdin.write(text.encode("utf-8", errors="replace"))
        stdin.seek(0)
        process = subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, cwd="/", env={}, start_new_session=True
        )
        try:
            late = _late(process, stderr.fileno(), seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said, complaint = (
            os.pread(file.fileno(), OUTPUT_BYTES, 0).decode(errors="replace") for file in (stdout, stderr)
        )
    if complaint.endswith(done) and process.returncode == 0:
        return Outcome(None, said)
    if late or process.returncode in (
        -signal.SIGKILL,
        128 + signal.SIGKILL,
    ):  # the limit of CPU time kills too
        return Outcome("timeout", said)
    lines = complaint.removeprefix(READY.decode()).strip().splitlines()
    return Outcome(lines[-1] if lines else f"left early with code {process.returncode}", said)


def _late(process: "subprocess.Popen[bytes]", stderr: int, seconds: float) -> bool:
    """Wait for the program's end; True if it has not come in time. The clock starts when the program does."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and os.pread(stderr, len(READY), 0) != READY and time.monotonic() < deadline:
        time.sleep(0.002)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        return True


def _walls() -> list[str]:
    """bubblewrap's arguments: Python's own files, read-only, and nothing else of this machine."""
    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    walls = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    for name in ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache"):
        path = Path(name)
        if path.is_symlink():
            walls += ["--symlink", str(path.readlink()), name]
        elif path.exists():
            walls += ["--ro-bind", name, name]
    executable = Path(sys.executable).resolve()
    base = Path(sys.base_prefix).resolve()
    if base == Path("/usr"):
        walls += ["--ro-bind", str(executable), str(executable)]
    else:
        walls += ["--ro-bind", str(base), str(base)]
        if not executable.is_relative_to(base):
            walls += ["--ro-bind", str(executable), str(executable)]
    return [
        *walls,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--chdir",
        "/",
    ]
