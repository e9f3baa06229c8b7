"""Running a program that a model wrote: in a fresh interpreter, with limits, without our packages.

The limits stop accidents and most mischief. They are no wall against an attacker: on a machine that holds
secrets, run evaluations of programs in a container.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

SECONDS = 6.0
MEMORY = 1 << 30  # bytes of address space; programs of HumanEval need some 200 MB

# Reads the program from standard input. Network goes away where the kernel lets a user make a namespace.
BOOT = """
import ctypes, resource, sys
ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
limits = {"AS": %d, "CPU": %d, "FSIZE": 1 << 20, "CORE": 0, "NOFILE": 32}
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
program = sys.stdin.read()
sys.stdin.close()
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
"""


def passes(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether the program ends by itself, in time and without an error."""
    with tempfile.TemporaryDirectory(prefix="nanochat-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOT % (memory, int(seconds) + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "HOME": folder},
            start_new_session=True,
        )
        try:
            process.communicate(program.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_group(process)
        return process.returncode == 0


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """The program and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
