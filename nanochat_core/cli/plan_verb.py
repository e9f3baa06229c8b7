"""`nanochat plan`: what a run would do, and why, what it costs and when it would end."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_core.cli.options import (
    HOME,
    AsJson,
    BaseDir,
    Profile,
    Reruns,
    Sets,
    Stages,
    Until,
    command,
    load_plan,
    resolved,
    say,
    table,
    with_stages,
)

if TYPE_CHECKING:
    from nanochat_core.runner.plan import Plan, Verdict

QUICK_SECONDS = 20.0  # of a calibration that a plan makes unasked
SOON_SECONDS = 3600.0  # what ends within the hour needs no date
LONGEST_SECONDS = 3e9  # a century: no calendar is asked about more


def plan(
    profile: Profile,
    set_: Sets = None,
    stage_: Stages = None,
    rerun: Reruns = None,
    until: Until = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="time a few steps of the real model first; kept for this machine",
            show_default="if it takes seconds",
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="show this profile beside it, both from the start")
    ] = None,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Say what `run` would do, and why, and what it would cost: nothing is run."""
    from nanochat_core.artifacts.progress import count, power, span
    from nanochat_core.machine.probes import free_bytes
    from nanochat_core.runner.calibrate import has_cuda
    from nanochat_core.runner.estimate import forecast, needs
    from nanochat_core.runner.plan import by_other_code, explain, wasted

    set_ = with_stages(set_, stage_)
    if compare is not None:
        show_beside(profile, compare, set_ or [], base_dir, as_json)
        return
    made = load_plan(profile, set_, rerun, until, resolved(base_dir))
    verdicts = explain(made)
    measure(made, verdicts, calibrate if calibrate is not None or not as_json else False)
    costs, rate = forecast(made, verdicts)
    lost = wasted(made, verdicts)
    need, room = needs(made, verdicts), free_bytes(made.runtime.base_dir)
    known = sum(cost.seconds or 0.0 for cost in costs.values())
    ends = datetime.now().astimezone() + timedelta(seconds=min(known, LONGEST_SECONDS))
    if as_json:
        stages = {
            name: {
                "state": verdict.state,
                "why": verdict.why,
                "step": verdict.step,
                "fingerprint": made.jobs[name].fingerprint,
                "directory": str(made.jobs[name].path),
                **{key: costs[name].facts.get(key) for key in ("params", "steps", "tokens", "flops")},
                "seconds": costs[name].seconds,
                "about": costs[name].about,
                "disk": costs[name].disk,
            }
            for name, verdict in verdicts.items()
        }
        document = {
            "profile": profile,
            "stages": stages,
            "left_out": dict(made.left_out),
            "rate": rate,
            "disk_needed": need.disk,
            "disk_free": room,
            "ends": ends.isoformat(timespec="seconds"),
            "unused_seconds": lost,
            "made_by_other_code": by_other_code(made, verdicts),
        }
        print(json.dumps(document, indent=1))
        return
    rows = []
    for name, verdict in verdicts.items():
        facts, seconds, disk = costs[name].facts, costs[name].seconds, costs[name].disk
        state = f"resume at {verdict.step}" if verdict.state == "resume" else verdict.state
        numbers = [count(facts[key]) if key in facts else "" for key in ("params", "tokens")]
        numbers.append(power(facts["flops"]) if "flops" in facts else "")
        about = "about " if costs[name].about else ""
        time_text = "" if verdict.state == "hit" else about + span(seconds) if seconds is not None else "?"
        rows.append([name, state, *numbers, time_text, count(disk) + "B" if disk else "", verdict.why])
    table(["stage", "", "params", "tokens", "FLOPs", "time", "disk", "why"], rows)
    for name, why in made.left_out.items():
        print(f"left out: {name} ({why})")
    for name, seconds in lost.items():
        if seconds >= 60:
            where = made.runtime.base_dir / name
            print(f"{span(seconds)} of finished {name} would stay in {where} but not be used")
    trains = any(v.state != "hit" and costs[name].facts.get("flops") for name, v in verdicts.items())
    if trains:
        print(f"training that has not been timed yet is reckoned with {rate}")
    other = by_other_code(made, verdicts)
    if other:
        print(
            f"made by another state of the code, and kept: {', '.join(other)} (--rerun makes a stage again)"
        )
    unknown = sum(v.state != "hit" and costs[n].seconds is None for n, v in verdicts.items())
    more = f", and {unknown} stages that have not been timed yet" if unknown else ""
    if known or unknown:
        short = f": {count(need.disk - room)}B too few" if room < need.disk else ""
        print(f"disk: {count(need.disk)}B still needed at its fullest, {count(room)}B free{short}")
        date = f", until {ends:%A %d %B %Y %H:%M} if it starts now" if known > SOON_SECONDS else ""
        print(f"{made.title}: {span(known)} by what is known{more}{date}. Nothing was run.")
    else:
        print("All done.")
    if "an assumed" in rate and trains:
        print(f"to have it measured: {command('plan', profile, set_, rerun, until, base_dir)} --calibrate")
    if room < need.disk or (made.runtime.device == "cuda" and not has_cuda(made.runtime)):
        why = command("doctor", profile, set_, None, None, base_dir)
        print(f"this machine cannot carry it; why, and what to do: {why}")
    else:
        print(f"next: {command('run', profile, set_, rerun, until, base_dir)}")


def measure(made: "Plan", verdicts: "dict[str, Verdict]", asked: bool | None) -> None:
    """Calibrate if that was asked for; unasked only where it takes seconds and is news."""
    from nanochat_core.runner.calibrate import calibrate, cost, has_cuda, kept, shape_of
    from nanochat_core.runner.plan import latest_run

    if asked:
        calibrate(made, say)
    if asked is not None or made.base is None or shape_of(made) is None or kept(made) is not None:
        return
    timed = latest_run(made.runtime.base_dir, made.profile) is not None
    here = has_cuda(made.runtime) or made.runtime.device != "cuda"
    if verdicts[made.base].state in ("hit", "fetch") or timed or not here or cost(made)[0] > QUICK_SECONDS:
        return
    if has_cuda(made.runtime):  # compiling for a GPU takes a minute before the first step
        return
    try:
        calibrate(made, say)
    except (ValueError, OSError) as error:
        say(f"not calibrated: {error}")


def show_beside(profile: str, other: str, sets: list[str], base_dir: Path, as_json: bool) -> None:
    """Two profiles from the start, by arithmetic; --set changes the first."""
    from nanochat_core.artifacts.progress import count, power
    from nanochat_core.runner.compare import plan_facts

    root = resolved(base_dir)
    first = plan_facts(load_plan(profile, sets, None, None, root))
    second = plan_facts(load_plan(other, None, None, None, root))
    if as_json:
        print(json.dumps({profile: first, other: second}, indent=1))
        return

    def words(key: str, value: float | str | None) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if key in ("depth", "steps", "batch", "vocabulary"):
            return f"{value:,.0f}"
        if key == "FLOPs":
            return power(value)
        return count(value) + ("B" if key == "disk" else "")

    table(["", profile, other], [[key, words(key, first[key]), words(key, second[key])] for key in first])
    print(f"next: {command('plan', profile, sets, None, None, base_dir)}")
