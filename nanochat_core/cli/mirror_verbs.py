"""More than one machine: `nanochat mirror` keeps copies from which another goes on, `nanochat join` helps."""

import sys
from typing import Annotated

import typer

from nanochat_core.cli.options import (
    HOME,
    BaseDir,
    Profile,
    Sets,
    Stages,
    Until,
    command,
    load_plan,
    say,
    table,
    usable,
    with_base,
    with_stages,
)

INTERRUPTED = 130


def mirror(
    profile: Profile,
    set_: Sets = None,
    stage_: Stages = None,
    until: Until = None,
    to: Annotated[
        str | None,
        typer.Option("--to", envvar="NANOCHAT_MIRROR", metavar="URL", help="s3://..., file:///..."),
    ] = None,
    base_dir: BaseDir = HOME,
) -> None:
    """Send what this machine has of a run, finished or begun, to the mirror; a run does so by itself."""
    from nanochat_core.artifacts.mirror import of, reason
    from nanochat_core.runner.sync import Copies

    set_ = with_stages(set_, stage_)
    plan = load_plan(profile, [*(set_ or []), *([f"runtime.mirror={to}"] if to else [])], None, until,
                     usable(base_dir))  # fmt: skip
    held = of(plan.runtime)
    if held is None:
        raise ValueError("there is no mirror: name one with --to, NANOCHAT_MIRROR or runtime.mirror")
    copies = Copies(held, plan.jobs, plan.runtime.base_dir, say)
    here = copies.lacking()
    if not here:
        make = command("run", profile, set_, None, until, base_dir)
        raise ValueError(
            f"nothing of this run is in {plan.runtime.base_dir}, so nothing was sent; make it: {make}"
        )
    try:
        sent = copies.round()
    except Exception as error:  # each driver has exceptions of its own
        lacking = ", ".join(copies.lacking())
        say(f"error: {held.url} cannot be written: {reason(error)}; it lacks {lacking}")
        raise typer.Exit(1) from None
    held_back = [name for name in here if name not in copies.sent]
    words = {name: "sent" if name in sent else "was there" for name in here}
    words |= dict.fromkeys(held_back, "damaged here, so not sent")
    table(["stage", "here", ""], [[name, mark.split()[0], words[name]] for name, mark in here.items()])
    if held_back:
        say(f"next: {command('verify', profile, set_, None, until, base_dir)}", out=sys.stdout)
        raise typer.Exit(1)
    on = command("run", profile, [*(set_ or []), f"runtime.mirror={held.url}"], None, until, HOME)
    say(f"next: on another machine: {on}", out=sys.stdout)


def join(base_dir: BaseDir = HOME) -> None:
    """Help a run that another machine leads (runtime.nnodes > 1) over this same, shared base directory."""
    from nanochat_core.runner.join import join

    root = usable(base_dir)
    say(f"waiting for a stage to be called in {root}; Ctrl-C ends it")
    try:
        join(root, say)
    except KeyboardInterrupt:
        say("left; the others wait for this machine to come back. To go on: "
            + with_base("nanochat join", base_dir))  # fmt: skip
        raise typer.Exit(INTERRUPTED) from None
