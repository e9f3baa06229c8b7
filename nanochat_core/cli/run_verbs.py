"""`nanochat run` and `nanochat stage`: do the work, the whole table or one row."""

import sys
import uuid
from functools import partial
from typing import Annotated, NoReturn

import typer

from nanochat_core.cli.options import (
    HOME,
    BaseDir,
    Profile,
    Reruns,
    Sets,
    Stages,
    Until,
    Yes,
    command,
    load_plan,
    options,
    say,
    usable,
    with_base,
    with_stages,
)

INTERRUPTED = 130


def run(
    profile: Profile,
    set_: Sets = None,
    stage_: Stages = None,
    rerun: Reruns = None,
    until: Until = None,
    base_dir: BaseDir = HOME,
    yes: Yes = False,
) -> None:
    """Run a profile's whole pipeline here and now; what is done already is not done again."""
    from flows import server
    from nanochat_core.artifacts.stage import Interrupted
    from nanochat_core.runner.launch import StageFailed, made_by
    from nanochat_core.runner.plan import costly_reruns, explain, remember
    from nanochat_core.runner.rendezvous import refuse_loopback
    from nanochat_core.runner.sync import following

    set_ = with_stages(set_, stage_)
    plan = load_plan(profile, set_, rerun, until, usable(base_dir))
    verdicts = explain(plan)
    confirm_cost(costly_reruns(plan, verdicts, plan.jobs), yes)
    refuse_loopback(plan.runtime)
    token = str(uuid.uuid4())
    try:
        if all(verdict.state == "hit" for verdict in verdicts.values()) and not server.address(
            plan.runtime.base_dir
        ):
            remember(plan)  # nothing to do, and nobody to tell but the mirror
            say(f"cached     {', '.join(plan.jobs)}")
            with following(plan, say) as copies:
                copies.finish()
        else:
            server.prepare(plan.runtime.base_dir)
            from flows.speedrun import run_here

            run_here(plan, set_ or [], rerun or [], until, token)
    except (KeyboardInterrupt, Interrupted, StageFailed) as end:
        left = [name for name in rerun or [] if not made_by(plan.jobs[name].path, token)]
        stopped(end, command("run", profile, set_, left, until, base_dir))
    model = next((row for row in reversed(list(plan.jobs)) if plan.table[row].trains), None)
    if plan.report is None:
        say(
            f"done, until {until}. Go on: {command('run', profile, set_, None, None, base_dir)}",
            out=sys.stdout,
        )
        return
    if model is not None:
        say(f"talk to it: {with_base('nanochat chat ' + model, base_dir)}", out=sys.stdout)
    say(f"report: {plan.jobs[plan.report].path / 'report.md'}", out=sys.stdout)


def stage(
    name: Annotated[str, typer.Argument(help="a row of the table, for example pretrain")],
    profile: Profile,
    set_: Sets = None,
    stage_: Stages = None,
    rerun: Reruns = None,
    base_dir: BaseDir = HOME,
    yes: Yes = False,
) -> None:
    """Run one stage without Prefect; what it reads and is not there is made first."""
    from nanochat_core.artifacts.stage import Interrupted
    from nanochat_core.runner.launch import StageFailed, launch, result_of
    from nanochat_core.runner.plan import costly_reruns, explain, needed, remember
    from nanochat_core.runner.rendezvous import refuse_loopback
    from nanochat_core.runner.run_display import RunDisplay
    from nanochat_core.runner.sync import following

    set_ = with_stages(set_, stage_)
    plan = load_plan(profile, set_, rerun, name, usable(base_dir))
    if name not in plan.jobs:
        raise ValueError(f"there is no {name} to run: {plan.left_out[name]}")
    verdicts = explain(plan)
    rows = needed(plan, name, verdicts)
    confirm_cost(costly_reruns(plan, verdicts, rows), yes)
    refuse_loopback(plan.runtime)
    remember(plan)
    terminal, token = RunDisplay(), str(uuid.uuid4())
    again = f"nanochat stage {name} {profile}" + options(set_, None, None, base_dir)
    try:
        with following(plan, say) as copies:
            for row in rows:
                why = verdicts[row].why if row == name else f"{verdicts[row].why}; needed for {name}"
                with terminal.stage(row, why, partial(result_of, plan.jobs[row].path)) as see:
                    launch(plan, row, see, rerun=token)
            copies.finish()
    except (KeyboardInterrupt, Interrupted, StageFailed) as end:
        stopped(end, again)
    if not rows:
        say(f"cached     {name}")
    say(f"done: {plan.jobs[name].path}", out=sys.stdout)
    say(f"next: {command('run', profile, set_, None, None, base_dir)}", out=sys.stdout)


def confirm_cost(lost: list[str], yes: bool) -> None:
    """Before hours of finished training go unused: say so, and ask."""
    for line in lost:
        say(line)
    if yes or not lost:
        return
    if not sys.stdin.isatty():
        raise ValueError("that is more than an hour of finished work; say --yes if it is meant")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(2)


def stopped(end: BaseException, again: str) -> NoReturn:
    """The last words of a run that did not reach its end, and the code to leave with."""
    from nanochat_core.runner.launch import StageFailed

    if isinstance(end, StageFailed):
        say(f"error: {end}")
        say(f"its log: {end.log}")
        say(f"when that is put right: {again}")
        raise typer.Exit(1) from None
    say(f"interrupted; what was done is kept. To go on: {again}")
    raise typer.Exit(INTERRUPTED) from None
