"""Programs that a model wrote: good ones run, bad ones reach nothing, endless ones end."""

import functools
import platform
import time

import pytest

from nanochat_core.infer import sandbox
from nanochat_core.infer.sandbox import NoSandbox, Outcome, run_program


def isolation() -> str:
    try:
        return sandbox.available()
    except NoSandbox:
        return "none"


needs_any = pytest.mark.skipif(isolation() == "none", reason="needs Linux on x86_64 or aarch64")
needs_walls = pytest.mark.skipif(isolation() != "bubblewrap", reason="needs bubblewrap and user namespaces")
run = functools.partial(run_program, seconds=5, allow_weaker=True)


@needs_any
def test_a_good_program_runs_to_its_end() -> None:
    program = (
        "import math, re, collections, itertools, random, heapq, typing, hashlib\nprint(math.comb(5, 2))"
    )
    assert run(program) == Outcome(None, "10\n")
    assert run("x = [0] * 10_000_000; s = set(range(1_000_000)); print(len(s))").error is None
    assert run("class A:\n    def f(self): return __name__\nassert A().f() == '__main__'").error is None
    assert run("print('日本 \\ud83d'[:2])") == Outcome(None, "日本\n")


@needs_any
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "left early with code 0"),
        ("import os; os._exit(0)", "left early with code 0"),
        ("import sys; sys.stderr.write('ready\\n'); sys.exit(3)", "ready"),
        ("x = bytearray(10 << 30)", "MemoryError"),
        ("while True: print('x' * 1000)", "OSError: [Errno 27] File too large"),
        ("import os\nwhile True: os.fork()", "PermissionError: [Errno 1] Operation not permitted"),
        ("import socket; socket.socket()", "PermissionError: [Errno 1] Operation not permitted"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError: [Errno 1] Operation not permitted"),
        ("import subprocess; subprocess.run(['ls'])", "PermissionError: [Errno 1] Operation not permitted"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_bad_program_fails_and_says_how(program: str, error: str) -> None:
    assert run(program).error == error


@needs_any
def test_the_back_doors_are_shut_too() -> None:
    assert run("import posix; print(posix.system('id'))").stdout != "0\n"
    traced = (
        "import ctypes; print(ctypes.CDLL(None).ptrace(16, 1, 0, 0), ctypes.CDLL(None).unshare(0x10000000))"
    )
    assert run(traced).stdout == "-1 -1\n"
    assert run("import os; print(sorted(os.environ))").stdout in ("['LC_CTYPE']\n", "['LC_CTYPE', 'PWD']\n")


@needs_any
def test_an_endless_program_ends_on_time() -> None:
    for program in ("while True: pass", "import time; time.sleep(60)"):
        start = time.monotonic()
        assert run(program, seconds=0.5).error == "timeout"
        assert time.monotonic() - start < 5


@needs_walls
@pytest.mark.parametrize(
    "program",
    [
        "open('/etc/shadow')",
        "open('/etc/passwd')",
        "open('/tmp/x', 'w')",
        "open('/dev/shm/x', 'w')",
        "open('/x', 'w')",
        "import os; os.symlink('/etc/shadow', '/tmp/a'); open('/tmp/a')",
        "import os; os.mkdir('/proc/x')",
        "import os; os.listdir('/home')",
        "open('/proc/1/root/etc/shadow')",
    ],
)
def test_the_machines_files_are_not_there(program: str) -> None:
    error = run(program).error
    assert error is not None and (
        "FileNotFoundError" in error or "OSError" in error or "PermissionError" in error
    )


@needs_walls
def test_other_processes_are_not_there() -> None:
    program = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))"
    assert int(run(program).stdout) <= 2


def test_without_walls_nothing_runs_unless_it_is_allowed(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "weaker")
    with pytest.raises(NoSandbox, match="apt install bubblewrap"):
        run_program("print(1)")
    if isolation() != "none":
        assert run_program("print(1)", allow_weaker=True) == Outcome(None, "1\n")


@needs_any
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86_64 has a second set of numbers")
def test_a_call_under_its_other_number_is_refused_as_well() -> None:
    program = """if True:
        import ctypes
        print(ctypes.CDLL(None, use_errno=True).syscall(0x40000000 + 41, 2, 1, 0), ctypes.get_errno())"""
    assert run(program).stdout == "-1 1\n"
