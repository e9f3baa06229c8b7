"""Programs that a model wrote: good ones run, bad ones reach nothing, endless ones end."""

import functools
import platform
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat_core.infer import sandbox, seccomp
from nanochat_core.infer.sandbox import NoSandbox, Pool, ProgramResult, run_program


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
    assert run(program) == ProgramResult(None, "10\n")
    assert run("x = [0] * 10_000_000; s = set(range(1_000_000)); print(len(s))").error is None
    assert run("class A:\n    def f(self): return __name__\nassert A().f() == '__main__'").error is None
    assert run("print('日本 \\ud83d'[:2])") == ProgramResult(None, "日本\n")


@needs_any
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "left early with code 0"),
        ("import os; os._exit(0)", "left early with code 0"),
        ("import sys; sys.stderr.write('ready\\n'); sys.exit(3)", "left early with code 3"),
        ("x = bytearray(10 << 30)", "MemoryError"),
        ("while True: print('x' * 1000)", "OSError: [Errno 27] File too large"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "too much on standard error"),
        ("x = [0]\nwhile True: x += x", "MemoryError"),
        ("import threading; threading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
        ("import os\nwhile True: os.fork()", "PermissionError: [Errno 1] Operation not permitted"),
        ("import socket; socket.socket()", "PermissionError: [Errno 1] Operation not permitted"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError: [Errno 1] Operation not permitted"),
        ("import subprocess; subprocess.run(['ls'])", "PermissionError: [Errno 1] Operation not permitted"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_bad_program_fails_and_says_how(program: str, error: str) -> None:
    assert run(program).error == error


# Each prints -1 if it is refused, and something else if it gets through.
BACK_DOORS = {
    "posix": "import posix; print(-1 if posix.system('echo reached') else 0)",
    "posix, restored": "import sys; del sys.modules['os']; import os; print(-1 if os.system('id') else 0)",
    "spawn": "import posix\ntry: posix.posix_spawn('/bin/sh', ['sh'], {})\nexcept OSError: print(-1)",
    "ptrace": "import ctypes; print(ctypes.CDLL(None).ptrace(16, 1, 0, 0))",
    "ptrace of itself": "import ctypes; print(ctypes.CDLL(None).ptrace(0, 0, 0, 0))",
    "namespaces": "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))",
    "a signal to the parent": "import ctypes, os; print(ctypes.CDLL(None).kill(os.getppid(), 9))",
    "a signal to all": "import ctypes; print(ctypes.CDLL(None).kill(-1, 9))",
    "its limits": "import ctypes; print(ctypes.CDLL(None).setrlimit(9, b'\\0\\0\\0\\0\\0\\0\\1\\0' * 2))",
    "a device": "import ctypes; print(ctypes.CDLL(None).mknod(b'/tmp/null', 0o20666, 259))",
}  # fmt: skip


@needs_any
@pytest.mark.parametrize("program", BACK_DOORS.values(), ids=list(BACK_DOORS))
def test_the_back_doors_are_shut_too(program: str) -> None:
    assert run(program) == ProgramResult(None, "-1\n")


@needs_any
@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize(
    "call", [(129, "os.getppid(), 9, bytes(128)"), (434, "1, 0"), (425, "1, bytes(120)")]
)
def test_a_raw_call_is_refused_with_the_reason(call: tuple[int, str]) -> None:
    number, arguments = call
    program = (
        "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(libc.syscall({number}, {arguments}), ctypes.get_errno())"
    )
    assert run(program).stdout == "-1 1\n"


@needs_any
def test_a_program_sees_nothing_of_our_environment(monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert run("import os; print(sorted(os.environ))").stdout in ("['LC_CTYPE']\n", "['LC_CTYPE', 'PWD']\n")


# In the weaker mode too: the filter alone has to hold. {target}: a file of ours outside.
CHANGES = [
    "open('{target}', 'w')",
    "open('{target}', 'a')",
    "open('{target}.new', 'x')",
    "import os; os.unlink('{target}')",
    "import os; os.rename('{target}', '{target}.new')",
    "import os; os.mkdir('{target}.new')",
    "import os; os.symlink('{target}', '{target}.new')",
    "import os; os.link('{target}', '{target}.new')",
    "import os; os.chmod('{target}', 0o777)",
    "import os; os.truncate('{target}', 0)",
    "import os; os.utime('{target}')",
    "import os; os.setxattr('{target}', 'user.x', b'x')",
    "import os; os.open('{target}', os.O_RDONLY | os.O_TRUNC)",
    "import os; os.mkfifo('{target}.new')",
    "import shutil; shutil.rmtree('{folder}')",
    "import ctypes, os; r = ctypes.CDLL(None).creat(b'{target}', 0o600); assert r >= 0, 'PermissionError'",
]


@needs_any
@pytest.mark.parametrize("isolation", ["weaker", pytest.param("bubblewrap", marks=needs_walls)])
def test_nothing_outside_can_be_changed(isolation: sandbox.Isolation, tmp_path) -> None:
    target = tmp_path / "ours"
    target.write_text("ours")
    before = target.stat()
    for change in CHANGES:
        program = change.format(target=target, folder=tmp_path)
        outcome = sandbox.run_once(program, 5, 512, isolation)
        assert outcome.error is not None and ("Error" in outcome.error), program
    assert [path.name for path in tmp_path.iterdir()] == ["ours"] and target.read_text() == "ours"
    assert (target.stat().st_mode, target.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


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
        f"open({str(Path.home() / '.bashrc')!r})",
        f"open({__file__!r})",
        "import os; os.chdir('/proc/1'); open('root/etc/shadow')",
        "import os; os.chdir('/proc/self'); os.chdir('root/etc'); open('shadow')",
        "import os; open('/proc/1/environ').read().index('HOME')",
        "open('/dev/mem')",
        "import os; os.listdir('/sys')",
    ],
)
def test_the_machines_files_are_not_there(program: str) -> None:
    error = run(program).error
    assert error is not None
    assert error.split(":")[0] in ("FileNotFoundError", "OSError", "PermissionError", "ValueError")


@needs_walls
def test_of_the_home_folder_only_python_itself_is_there() -> None:
    home, python = Path.home(), Path(sys.base_prefix).resolve()
    there = run(f"import os; print(*(os.listdir({str(home)!r}) if os.path.exists({str(home)!r}) else []))")
    expected = [python.relative_to(home).parts[0]] if python.is_relative_to(home) else []
    assert there == ProgramResult(None, " ".join(expected) + "\n")


@needs_walls
def test_other_processes_are_not_there() -> None:
    program = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))"
    assert int(run(program).stdout) <= 2


def test_without_walls_nothing_runs_unless_it_is_allowed(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "weaker")
    with pytest.raises(NoSandbox, match="apt install bubblewrap"):
        run_program("print(1)")
    if isolation() != "none":
        assert run_program("print(1)", allow_weaker=True) == ProgramResult(None, "1\n")


def test_without_bubblewrap_and_without_leave_nothing_runs(monkeypatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    sandbox.available.cache_clear()
    try:
        with pytest.raises(NoSandbox):
            run_program("print(1)")
    finally:
        sandbox.available.cache_clear()


@needs_any
def test_a_sandbox_that_does_not_come_up_is_not_held_against_the_program(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "INSIDE", "raise SystemExit('no seccomp')")
    with pytest.raises(NoSandbox, match="did not start: no seccomp"):
        sandbox.run_once("print(1)", 5, 512, "weaker")
    with pytest.raises(NoSandbox, match="no seccomp"):
        Pool("weaker").run("print(1)", 5, 512)
    monkeypatch.setattr(sandbox.sys, "executable", "/absent/python")
    with pytest.raises(NoSandbox, match="cannot be started"):
        Pool("weaker").run("print(1)", 5, 512)


@needs_any
def test_an_interpreter_that_died_while_it_waited_is_passed_over() -> None:
    pool = Pool("weaker")
    while pool._waiting.empty():
        time.sleep(0.01)
    first = pool._waiting.queue[0]
    assert isinstance(first, sandbox.Waiting)
    first.kill()
    first.process.wait()
    for i in range(sandbox.AHEAD + 2):
        assert pool.run(f"print({i})", 5, 512) == ProgramResult(None, f"{i}\n")


@needs_any
def test_programs_leave_nothing_to_each_other_and_may_come_from_many_threads() -> None:
    def ask(i: int) -> ProgramResult:
        return run(f"import math, sys; print(hasattr(math, 'left')); math.left = {i}; print({i})")

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(12))) == [ProgramResult(None, f"False\n{i}\n") for i in range(12)]


@needs_any
def test_a_program_costs_less_than_50_ms_once_interpreters_wait() -> None:
    spent = []
    for _ in range(8):
        time.sleep(0.1)  # the pool fills up again
        start = time.perf_counter()
        assert run("from typing import List\nassert sorted([2, 1]) == [1, 2]").error is None
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.05


def test_the_filter_has_a_number_for_each_call_and_knows_its_machines() -> None:
    for machine, column in (("x86_64", 0), ("aarch64", 1)):
        steps = list(struct.iter_unpack("HBBI", seccomp.program_filter(machine)))
        numbers = {value for code, _, _, value in steps if code == seccomp.EQUAL}
        assert {n[column] for n in seccomp.CALLS.values() if n[column]} < numbers
        assert steps[-1] == (seccomp.RETURN, 0, 0, seccomp.ALLOW) and len(steps) < 4096
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.program_filter("riscv64")


@needs_any
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86_64 has a second set of numbers")
def test_a_call_under_its_other_number_is_refused_as_well() -> None:
    program = """if True:
        import ctypes
        print(ctypes.CDLL(None, use_errno=True).syscall(0x40000000 + 41, 2, 1, 0), ctypes.get_errno())"""
    assert run(program).stdout == "-1 1\n"
