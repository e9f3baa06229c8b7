"""The toy pipeline in the hands of a test."""

import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import store
from nanochat_core.runner import launch
from nanochat_core.runner import plan as plans

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TOY = Path(__file__).parent / "toy"
PROFILE = TOY / "toy.toml"


def make(made: plans.Plan, *only: str) -> None:
    """Every row in order, or these, in this process: for tests of what comes after."""
    before = signal.getsignal(signal.SIGTERM)
    for name in only or made.jobs:
        job = made.jobs[name]
        job.path.mkdir(parents=True, exist_ok=True)
        store.write_json(job.path / "job.json", launch.describe(made, name, None))
        launch.execute(job.path / "job.json")
    signal.signal(signal.SIGTERM, before)
    plans.remember(made)


@dataclass(frozen=True)
class Toy:
    """The toy pipeline over one base directory."""

    base_dir: Path

    def plan(self, *overrides: str, **options: Any) -> plans.Plan:
        return plans.load(str(PROFILE), overrides, base_dir=self.base_dir, **options)

    def run(self, made: plans.Plan, rerun: str | None = None) -> list[str]:
        """Every row in order; the names of those that had work to do."""
        worked = []
        for name in made.jobs:
            if launch.pending(made, name, rerun):
                worked.append(name)
                launch.launch(made, name, rerun=rerun)
        plans.remember(made)
        return worked

    def make(self, made: plans.Plan, *only: str) -> None:
        make(made, *only)

    def starts(self, made: plans.Plan, name: str) -> list[str]:
        """The step each attempt at a training stage began with."""
        notes = self.base_dir / "starts" / f"{name}-{made.jobs[name].fingerprint}"
        return notes.read_text().split() if notes.exists() else []
