"""The flow: one task run per row of the table, cached by fingerprint as long as the disk agrees."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.states import Cancelled, Completed, Failed
from pydantic import Field

from flows import downloads
from flows.examine import examine
from flows.recovery import default_base_dir, present
from flows.report_page import publish_report
from flows.watch import Cancellation, Watch
from nanochat_core.artifacts.progress import Row
from nanochat_core.artifacts.stage import Interrupted, Metrics
from nanochat_core.pipeline import STAGES
from nanochat_core.report.headline import headline
from nanochat_core.runner import inputs, rendezvous
from nanochat_core.runner import plan as plans
from nanochat_core.runner.exits import log_tail
from nanochat_core.runner.launch import InputLost, StageFailed, insist, pending, result_of
from nanochat_core.runner.plan import Plan
from nanochat_core.runner.run_display import RunDisplay
from nanochat_core.runner.sync import following

REPAIRS = 5  # of artefacts damaged while a run was on its way; more than that is a broken disk

terminal: ContextVar[RunDisplay | None] = ContextVar("terminal", default=None)
"""Where a run started by hand shows its progress; a worker's has nobody to show it to."""

request: ContextVar[str | None] = ContextVar("request", default=None)
"""The name of a request to run stages again, if not the flow run's own id."""

# A stage of the user's own has another name, so that these are examples and no enumeration.
StageName = Annotated[str, Field(examples=[stage.name for stage in STAGES])]
ProfileName = Annotated[str, Field(json_schema_extra={"enum": plans.profile_names()})]

BY_FINGERPRINT = CacheKeyFnPolicy(
    cache_key_fn=lambda _, inputs: f"nanochat-{inputs['stage']}-{inputs['fingerprint']}-{inputs['base_dir']}"
)


class CostRefused(ValueError):
    """The changed recipe would leave hours of finished training unused, and nobody said that it may."""


@flow(name="speedrun", persist_result=False, validate_parameters=True)
def speedrun(
    profile: ProfileName = "cpu-demo",
    overrides: Sequence[str] = (),
    rerun: Sequence[StageName] = (),
    until: StageName | None = None,
    base_dir: str | None = None,
    accept_cost: bool = False,
) -> dict[str, Metrics] | State[Any]:
    """Train a ChatGPT clone end to end, doing only what is not done already.

    Args:
        profile: which model, data and machine
        overrides: changes to the recipe, each as stage.key=value, for example pretrain.depth=4;
            profile.stages=["/where/it/is/my_stage.py:name"] adds a stage of yours
        rerun: stages to make again, with all that follows from them
        until: the last stage to run
        base_dir: where everything is kept; NANOCHAT_BASE_DIR or ~/.cache/nanochat if left empty
        accept_cost: go on although more than an hour of finished training would be left unused
    """
    root = Path(base_dir).expanduser().absolute() if base_dir else default_base_dir()
    with present(root, str(runtime.flow_run.id), runtime.flow_run.run_count):
        try:
            return train(profile, overrides, rerun, until, root, accept_cost)
        except (StageFailed, ValueError) as error:
            if runtime.deployment.id is None:  # the command that started it tells what to do
                raise
            command = ["nanochat", "run", profile, "--base-dir", str(root)]
            for override in overrides:
                command += ["--set", override]
            words = str(error) + (way_on(shlex.join(command)) if isinstance(error, StageFailed) else "")
            get_run_logger().error(words)
            return Failed(message=words)


def way_on(command: str) -> str:
    """What somebody who reads of a failed stage can do about it."""
    again = f"prefect flow-run retry {runtime.flow_run.id}"
    return f"\nto go on from here: press Retry in the UI, or: {again}, or: {command}"


def train(
    profile: str,
    overrides: Sequence[str],
    rerun: Sequence[str],
    until: str | None,
    root: Path,
    accept_cost: bool,
) -> dict[str, Metrics] | State[Any]:
    """The body of the flow."""
    plan = plans.load(profile, overrides, base_dir=root, rerun=rerun, until=until)
    token = request.get() or str(runtime.flow_run.id)
    verdicts = plans.explain(plan)
    lost = plans.costly_reruns(plan, verdicts, [name for name in plan.jobs if pending(plan, name, token)])
    if lost and not accept_cost:
        raise CostRefused(f"{'; '.join(lost)}. Set accept_cost if that is meant")
    rendezvous.refuse_loopback(plan.runtime)
    plans.remember(plan)
    log, screen = get_run_logger(), terminal.get()
    if plan.runtime.preflight and any(verdict.state != "hit" for verdict in verdicts.values()):
        examine(plan, verdicts, screen)

    def run_stage(stage: str, fingerprint: str, base_dir: str, reads: dict[str, Any]) -> Any:
        """Bring one row to its result. What it reads is passed so that Prefect draws the edge."""
        job, task_log = plan.jobs[stage], get_run_logger()
        if not pending(plan, stage, token):
            task_log.info(f"[{stage}] found finished: {job.path}")
            found = record(plan, stage, result_of(job.path))
            return Completed(name="Adopted", message=f"found in {job.path}", data=found)
        why = verdicts[stage].why if verdicts[stage].state != "hit" else plans.judge(plan, stage, {}).why
        task_log.info(f"[{stage}] starts ({why}) in {job.path}")
        shown = screen.stage(stage, why, lambda: result_of(job.path)) if screen else nullcontext(no_one)
        try:
            with shown as show, Watch(stage, job.path, show) as watch:
                metrics = insist(plan, stage, watch.see, rerun=token, stopping=cancellation.asked)
        except StageFailed as failure:
            task_log.error(f"[{stage}] {failure}\n{log_tail(failure.log)}\nits log: {failure.log}")
            raise
        task_log.info(f"[{stage}] done  {headline(metrics)}")
        return record(plan, stage, metrics)

    stage_task = task(
        cache_policy=BY_FINGERPRINT,
        persist_result=True,
        result_serializer="json",
        result_storage=root / "prefect" / "results",
    )(run_stage)
    results: dict[str, Any] = {}

    def bring(name: str) -> bool:
        """One row's task run; whether there was anything to do."""
        todo = pending(plan, name, token)
        if name in results and not todo:
            return False
        if screen is not None and not todo:
            screen.found(name)
        reads = {role: results[row] for role, row in plan.sources[name].items()}
        if todo:
            with screen.bringing(name) if screen else nullcontext(no_one) as see:
                files = downloads.bring(plan, name, cancellation.asked, see)
            if files:
                reads["files"] = files
        one = stage_task.with_options(name=name, task_run_name=name, refresh_cache=todo)
        results[name] = one(name, plan.jobs[name].fingerprint, str(root), reads)
        return todo

    with (
        following(plan, screen.say if screen else log.warning) as copies,
        Cancellation() as cancellation,
    ):
        for repairs_left in reversed(range(REPAIRS)):
            try:
                worked = [name for name in plan.jobs if bring(name)]
                damaged = inputs.audit(plan) if worked else {}
            except InputLost as loss:
                if not repairs_left:
                    raise
                damaged = {loss.stage: loss.reason}
            except Interrupted as end:
                if cancellation.asked():
                    log.info(f"cancelled in {end}; what was done is kept")
                    return Cancelled(
                        message=f"stopped in {end}, which has saved a checkpoint; Retry goes on from it"
                    )
                raise
            if not damaged:
                break
            for row, why in damaged.items():
                log.warning(f"[{row}] {why}; what is damaged is made again")
        else:
            raise ValueError(f"{', '.join(damaged)}: damaged again as soon as made; look at the disk")
        copies.finish()
    if screen is not None:
        screen.sum_up()
    if plan.report is not None:
        publish_report(plan.jobs[plan.report].path)
    return {name: result_of(job.path) for name, job in plan.jobs.items()}


def no_one(row: Row) -> None:
    """Where there is no terminal, nobody sees a row there."""


def record(plan: Plan, name: str, metrics: Metrics) -> dict[str, Any]:
    """What a task run returns: its artefact's place and numbers. Prefect keeps a copy; the disk decides."""
    job = plan.jobs[name]
    return {
        "stage": name,
        "fingerprint": job.fingerprint,
        "directory": str(job.path),
        "metrics": metrics,
    }


def run_here(
    plan: Plan, overrides: Sequence[str], rerun: Sequence[str], until: str | None, token: str
) -> dict[str, Metrics]:
    """The flow in this process, seen at this terminal; its cost has been accepted."""
    terminal.set(RunDisplay())
    request.set(token)
    try:
        result = speedrun(
            profile=plan.profile,
            overrides=tuple(overrides),
            rerun=tuple(rerun),
            until=until,
            base_dir=str(plan.runtime.base_dir),
            accept_cost=True,
        )
    except (CancelledRun, TerminationSignal) as end:
        raise Interrupted(str(end)) from end
    assert isinstance(result, dict)
    return result
