"""Makes a finished `tiny` run in one process, which imports torch once: `python tests/tiny.py BASE_DIR`."""

import contextlib
import os
import sys
from pathlib import Path

from nanochat_core.artifacts import store
from nanochat_core.runner import launch, plan


def main(base_dir: Path) -> None:
    made = plan.load("tiny", base_dir=base_dir)
    os.environ.update(launch.SETTINGS | made.runtime.environment)
    for name, job in made.jobs.items():
        job.path.mkdir(parents=True)
        store.write_json(job.path / "job.json", launch.describe(made, name, None))
        with (job.path / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
            launch.execute(job.path / "job.json")
    plan.remember(made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
