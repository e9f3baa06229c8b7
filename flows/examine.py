"""The first task of a run that will take days: is this machine fit for it?"""

from collections.abc import Mapping

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from nanochat_core.runner.doctor import preflight
from nanochat_core.runner.plan import Plan, Verdict
from nanochat_core.runner.run_display import RunDisplay


@task(name="doctor", task_run_name="doctor", cache_policy=NO_CACHE)
def examine(plan: Plan, verdicts: Mapping[str, Verdict], screen: RunDisplay | None) -> dict[str, str]:
    """Find out before any long work; what is broken ends the run here, with what to do about it."""
    log = get_run_logger()

    def say(words: str) -> None:
        log.warning(words)
        if screen is not None:
            screen.say(f"doctor         {words}")

    lines = preflight(plan, verdicts, say)
    rows = [line._asdict() for line in lines]
    create_table_artifact(rows, key="doctor", description="What was found of this machine before the run")
    return {line.name: f"{line.state}: {line.found}" for line in lines}
