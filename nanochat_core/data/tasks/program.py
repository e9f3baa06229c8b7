"""Running a program that a model wrote: in a fresh interpreter, with limits, without our packages.

The limits stop accidents and most mischief. They are no wall against an attacker: on a machine that holds
secrets, run evaluations of programs in a container.
"""

import contextlib
import os
import secrets
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
said, program = sys.stdin.readline(), sys.stdin.read()
sys.stdin.close()
def finish(said=said, done=open(%d, "w")):
    done.write(said)
del said
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
finish()
"""


def passes(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether the program ends by itself, in time and without an error."""
    done = secrets.token_hex(8)  # said at the very end: leaving early is not passing
    with tempfile.TemporaryDirectory(prefix="nanochat-") as folder, tempfile.TemporaryFile() as heard:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOT % (memory, int(seconds) + 1, heard.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "HOME": folder},
            start_new_session=True,
            pass_fds=(heard.fileno(),),
        )
        try:
            process.communicate(f"{done}\n{program}".encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_group(process)
        heard.seek(0)
        return process.returncode == 0 and heard.read(64).decode(errors="replace").strip() == done


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """The program and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
