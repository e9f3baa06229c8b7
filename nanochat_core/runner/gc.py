"""What may go: artefacts that no profile's latest run names, and what re-runs and damage left beside them."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nanochat_core.runner.launch import lock_path
from nanochat_core.runner.status import at_work

FINGERPRINT = re.compile("[0-9a-f]{20}")
ASIDE = (".rerun", ".audit", ".damaged", ".old", ".part")


class Unused(NamedTuple):
    """A directory that nothing refers to any more."""

    directory: Path
    bytes: int
    why: str


def referenced(base_dir: Path) -> set[tuple[str, str]]:
    """(stage, fingerprint) of every row of every profile's latest run."""
    found: set[tuple[str, str]] = set()
    for path in (base_dir / "runs").glob("*.json"):
        found |= set(json.loads(path.read_text())["jobs"].items())
    return found


def unused(base_dir: Path, keep: int) -> Iterator[Unused]:
    """What `clear` would delete; of each stage the `keep` newest unreferenced artefacts stay."""
    needed = referenced(base_dir)
    for folder in sorted(base_dir.glob("*/")):
        stage, spare = folder.name, []
        for directory in sorted(folder.glob("*/")):
            fingerprint = directory.name.partition(".")[0]
            if not FINGERPRINT.fullmatch(fingerprint):
                continue  # no stage's
            if at_work(lock_path(base_dir, stage, fingerprint)):
                continue
            if directory.name.endswith(ASIDE):
                yield Unused(directory, size(directory), "left over from a re-run or set aside as damaged")
            elif (stage, directory.name) not in needed:
                spare.append(directory)
        spare.sort(key=lambda directory: directory.stat().st_mtime, reverse=True)
        for directory in spare[keep:]:
            done = (directory / "result.json").exists()
            yield Unused(
                directory,
                size(directory),
                "of an earlier recipe" if done else "unfinished, of an earlier recipe",
            )


def clear(found: Unused) -> None:
    shutil.rmtree(found.directory)


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
