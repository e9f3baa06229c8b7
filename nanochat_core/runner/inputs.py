"""What a stage reads is hashed before it is believed; what proves damaged loses its result and is made again.

Sizes are looked at often and hashes when it matters: before a stage reads, after a short stage has read, when
a stage fails, and once more at the end of a run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Job
from nanochat_core.runner.plan import Plan, judge


class Lost(ValueError):
    """What a stage reads is damaged, gone or another than it was started for; the message names it."""


def insist_on(job: Job[Any], described: Mapping[str, Mapping[str, Any]]) -> None:
    """Hash all that a job reads, as job.json describes it. A damaged artefact's result is taken back."""
    seen: set[Path] = set()
    for role, source in described.items():
        directory = job.inputs[role]
        if directory in seen:
            continue
        seen.add(directory)
        reads = f"{job.stage} reads {source['stage']}, "
        try:
            result = store.verify(directory, job.runtime.base_dir, hashes=True)
        except store.Damaged as damage:
            store.withdraw(directory, str(damage))
            raise Lost(f"{reads}which is damaged: {damage}; it is to be made again first") from None
        if result is None:
            raise Lost(f"{reads}which is not there any more; it is to be made again first")
        if store.content(result) != source["content"]:
            raise Lost(f"{reads}which has been made again meanwhile and differs")


def lost(plan: Plan, name: str) -> str | None:
    """The first row that a row reads and that is not finished as it stands on the disk, by sizes."""
    return next((row for row in plan.sources[name].values() if judge(plan, row, {}).state != "hit"), None)


def audit(plan: Plan) -> dict[str, str]:
    """Hash every finished artefact of a plan; row -> what is wrong, and its result is taken back."""
    found: dict[str, str] = {}
    for name, job in plan.jobs.items():
        try:
            if store.verify(job.path, plan.runtime.base_dir, hashes=True) is None:
                found[name] = "it is not there any more"
        except store.Damaged as damage:
            store.withdraw(job.path, str(damage))
            found[name] = str(damage)
    return found
