"""Runs a program that a model wrote, where it can do no harm: for HumanEval and for rewards from code.

Each program gets an interpreter of its own (not a fork of this process) in namespaces of its own, made by
bubblewrap: no network, no processes but its own, a file system that holds Python and nothing else, which it
cannot write. In there it limits its own memory, time and files, and gives up by seccomp what starts
processes, opens sockets, writes files or looks into others. Without bubblewrap the walls around reading are
missing; that is refused unless asked for. Interpreters are started ahead and wait, each for one program.
"""

import atexit
import contextlib
import functools
import json
import os
import platform
import queue
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Literal, NamedTuple

from nanochat_core.infer.seccomp import ARCHITECTURES, program_filter

OUTPUT_BYTES = 1 << 20  # of a program's output, and of its complaints; more ends in an error
START_SECONDS = 10  # for the interpreter to be ready, before the program's own time begins
READY = b"ready\n"
AHEAD = max(2, min(8, os.cpu_count() or 1))  # interpreters that wait; each is about 10 MB

Isolation = Literal["bubblewrap", "weaker"]


class ProgramResult(NamedTuple):
    """How a program ended; `error` is None if it ran to its end."""

    error: str | None
    stdout: str


class NoSandbox(ValueError):
    """This machine cannot isolate a program well enough."""


# What runs inside, before the program does. It has no imports of ours. It imports what most programs will,
# waits for one request on standard input, and takes its limits and the filter upon itself before it obeys.
INSIDE = r"""
import ctypes, json, resource, sys
import collections, functools, heapq, itertools, math, re, typing
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
want = json.loads(sys.stdin.readline())
program = sys.stdin.read()
hard = [("AS", want["memory"]), ("CPU", want["seconds"] + 1), ("FSIZE", want["output"])]
hard += [("CORE", 0), ("NOFILE", 32)]
for name, value in hard:
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
steps = bytes.fromhex(want["filter"])
filled = Filter(len(steps) // 8, steps)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(filled), 0, 0):
    sys.exit("no seccomp")
def finish(how, word=want["done"], out=sys.stdout, err=sys.stderr):
    if not out.closed:
        out.flush()
    err.write(f"\n{word} {how}\n")
    err.flush()
del ctypes, json, resource, Filter, libc, steps, filled, want
del collections, functools, heapq, itertools, math, re, typing
sys.stdin = open(0, closefd=False)
print("ready", file=sys.stderr, flush=True)
try:
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
except SystemExit as left:
    finish(f"left early with code {left.code or 0}")
except BaseException:
    sys.excepthook(*sys.exc_info())
    finish("failed")
else:
    finish("done")
"""


def run_program(
    program: str, *, seconds: float = 5.0, memory_mb: int = 512, allow_weaker: bool = False
) -> ProgramResult:
    """Run it to its end or to a limit. NoSandbox if this machine has no walls and weaker are not allowed."""
    isolation = available()
    if isolation == "weaker" and not allow_weaker:
        raise NoSandbox(
            "programs written by a model are not run here: bubblewrap is missing or may not make namespaces. "
            "Install it (apt install bubblewrap), or allow the weaker sandbox, in which they can read files"
        )
    return _pool(isolation).run(program, seconds, memory_mb)


@functools.cache
def available() -> Isolation:
    """What this machine can do, found out by trying."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise NoSandbox(f"there is no sandbox for {sys.platform} on {platform.machine()}")
    if shutil.which("bwrap"):
        with contextlib.suppress(NoSandbox):
            if run_once("print(42)", 10, 512, "bubblewrap") == ProgramResult(None, "42\n"):
                return "bubblewrap"
    return "weaker"


def run_once(program: str, seconds: float, memory_mb: int, isolation: Isolation) -> ProgramResult:
    """In an interpreter started for it now: what the pool saves is this start."""
    one = _start(isolation)
    try:
        return _run(one, program, seconds, memory_mb)
    finally:
        one.kill()
        one.bury()


class Waiting(NamedTuple):
    """An interpreter that is up, or about to be, and waits for its program."""

    process: "subprocess.Popen[bytes]"
    stdin: IO[bytes]
    stdout: IO[bytes]  # a file, so that the kernel bounds it
    stderr: IO[bytes]

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Its end takes longer than most programs: the kernel takes the namespaces down."""
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.stderr.close()


class Pool:
    """Interpreters started ahead by a thread that does nothing else, and laid to rest by it.

    It lives as long as this process: bubblewrap's --die-with-parent means the thread that started it.
    """

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation
        self._waiting: queue.Queue[Waiting | OSError] = queue.Queue(AHEAD - 1)  # one more is in its hand
        self._killed: queue.SimpleQueue[Waiting] = queue.SimpleQueue()
        threading.Thread(target=self._fill, name="sandbox", daemon=True).start()
        atexit.register(self._close)

    def run(self, program: str, seconds: float, memory_mb: int) -> ProgramResult:
        one = self._take()
        try:
            return _run(one, program, seconds, memory_mb)
        finally:
            one.kill()
            self._killed.put(one)

    def _take(self) -> Waiting:
        """One that is alive. NoSandbox if they die before they are given anything."""
        for _ in range(AHEAD + 2):
            one = self._waiting.get()
            if isinstance(one, OSError):
                raise NoSandbox(f"the sandbox cannot be started: {one}")
            if one.process.poll() is None:
                return one
            told = one.stderr.read().decode(errors="replace").strip()
            self._killed.put(one)
        raise NoSandbox(f"the sandbox ends as soon as it is started: {told or 'without a word'}")

    def _fill(self) -> None:
        while True:
            try:
                self._waiting.put(_start(self._isolation))
            except OSError as error:
                self._waiting.put(error)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._killed.get_nowait().bury()

    def _close(self) -> None:
        for some in (self._waiting, self._killed):
            with contextlib.suppress(queue.Empty):
                while True:
                    one = some.get_nowait()
                    if isinstance(one, Waiting):
                        one.kill()
                        one.bury()


_pool = functools.cache(Pool)


def _start(isolation: Isolation) -> Waiting:
    python = [str(Path(sys.executable).resolve()), "-I", "-S", "-c", INSIDE]
    with contextlib.ExitStack() as unless_started:
        stdout = unless_started.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(
            [*_walls(), *python] if isolation == "bubblewrap" else python,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd="/",
            env={},
            start_new_session=True,
        )
        unless_started.pop_all()
    assert process.stdin is not None and process.stderr is not None
    return Waiting(process, process.stdin, stdout, process.stderr)


def _run(one: Waiting, program: str, seconds: float, memory_mb: int) -> ProgramResult:
    # Said at the very end: a program that leaves early does not pass for a whole one.
    word = secrets.token_hex(8)
    request = {
        "memory": memory_mb << 20,
        "seconds": int(seconds) + 1,
        "output": OUTPUT_BYTES,
        "filter": program_filter().hex(),
        "done": word,
    }
    text = json.dumps(request) + "\n" + program
    with contextlib.suppress(BrokenPipeError), one.stdin as stdin:
        stdin.write(text.encode("utf-8", errors="replace"))
    heard, late = _hear(one.stderr, word, seconds)
    stdout = os.pread(one.stdout.fileno(), OUTPUT_BYTES, 0).decode(errors="replace")
    told = heard.decode(errors="replace")
    if not heard.startswith(READY):
        raise NoSandbox(f"the sandbox did not start: {told.strip() or 'it does not answer'}")
    if late:
        return ProgramResult("timeout", stdout)
    if len(heard) > OUTPUT_BYTES:
        return ProgramResult("too much on standard error", stdout)
    complaint, last, how = told.removeprefix(READY.decode()).rpartition(f"\n{word} ")
    if last and how.strip() != "failed":
        return ProgramResult(None if how == "done\n" else how.strip(), stdout)
    if not last:  # it ended without a word
        complaint, code = how, one.process.wait()
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):  # as the limit of CPU time makes it
            return ProgramResult("timeout", stdout)
    lines = complaint.strip().splitlines()
    return ProgramResult(lines[-1] if lines else f"left early with code {one.process.poll()}", stdout)


def _hear(stderr: IO[bytes], word: str, seconds: float) -> tuple[bytes, bool]:
    """What it says on standard error, up to its last word; and whether its time was over before.

    The clock starts when the program does.
    """
    heard, started, deadline = bytearray(), False, time.monotonic() + START_SECONDS
    end = re.compile(rb"\n%b [^\n]*\n\Z" % word.encode())
    line = select.poll()
    line.register(stderr, select.POLLIN)
    while len(heard) <= OUTPUT_BYTES:
        if not line.poll(max(0, deadline - time.monotonic()) * 1000):
            return bytes(heard), True
        some = os.read(stderr.fileno(), 1 << 16)
        heard += some
        if not started and heard.startswith(READY):
            started, deadline = True, time.monotonic() + seconds
        if not some or end.search(heard, max(0, len(heard) - 200)):
            break
    return bytes(heard), False


@functools.cache
def _walls() -> tuple[str, ...]:
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
    walls += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
    return tuple(walls)
