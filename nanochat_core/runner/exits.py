"""Why a stage's process ended, read from its exit code and what it said."""

import re
import signal
from pathlib import Path

DISK_FULL = 28  # the exit code of a stage that met a full disk: its log lies there too
LOST = re.compile(  # what a rank says when another is gone
    r"Connection (closed|reset) by peer|Dist(Network|Backend|Store)Error|Rendezvous\w*Error"
)
FULL = "the disk is full; free some space and run the same command to go on"


def last_words(log: Path, begin: int, code: int) -> str:
    """Why a process ended, in its own words: its error line, or the end of its log. With several ranks the
    first that did not only lose another says why."""
    if not log.exists():  # the whole directory was taken away
        return f"its process ended with code {code} and its directory is gone; run the same command again"
    lines = said_since(log, begin)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code == DISK_FULL:
        return FULL
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}; run the same command to go on"
    killed = killed_rank(lines)
    if killed is not None:
        return f"rank {killed[0]} was ended by {killed[1].name}; run the same command to go on"
    if errors:
        return next((error for error in errors if not LOST.search(error)), errors[0])
    return "\n  " + "\n  ".join(lines[-8:]) if lines else f"its process ended with code {code} and no message"


def said_since(log: Path, begin: int) -> list[str]:
    with log.open("rb") as f:
        f.seek(begin)
        return f.read()[-40_000:].decode(errors="replace").strip().splitlines()


def killed_rank(lines: list[str]) -> tuple[int, signal.Signals] | None:
    """The rank that a signal ended, by torchrun's account, which has SIGTERM for those it ended itself."""
    rank = None
    for line in lines:
        if match := re.match(r"\s*rank\s*: (\d+) \(", line):
            rank = int(match[1])
        elif rank is not None and (match := re.match(r"\s*exitcode\s*: -(\d+) ", line)):
            number = signal.Signals(int(match[1]))
            if number != signal.SIGTERM:
                return rank, number
    return None


def log_tail(log: Path, lines: int = 30) -> str:
    """The end of a log, for whoever is shown that its stage has failed."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
