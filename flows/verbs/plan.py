"""`nanochat plan`: what a run would do, and why."""

import json

from flows.verbs.shared import (
    HOME,
    AsJson,
    BaseDir,
    Profile,
    Reruns,
    Sets,
    Until,
    command,
    load_plan,
    resolved,
    table,
)


def plan(
    profile: Profile,
    set_: Sets = None,
    rerun: Reruns = None,
    until: Until = None,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Say what `run` would do, and why: nothing is run."""
    from nanochat_core.forecast import forecast
    from nanochat_core.plan import by_other_code, explain, wasted
    from nanochat_core.progress import count, span

    made = load_plan(profile, set_, rerun, until, resolved(base_dir))
    verdicts = explain(made)
    costs, rate = forecast(made, verdicts)
    lost = wasted(made, verdicts)
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
                "disk": costs[name].disk,
            }
            for name, verdict in verdicts.items()
        }
        document = {
            "profile": profile,
            "stages": stages,
            "left_out": dict(made.left_out),
            "rate": rate,
            "unused_seconds": lost,
            "made_by_other_code": by_other_code(made, verdicts),
        }
        print(json.dumps(document, indent=1))
        return
    rows = []
    for name, verdict in verdicts.items():
        facts, seconds, disk = costs[name].facts, costs[name].seconds, costs[name].disk
        state = f"resume at {verdict.step}" if verdict.state == "resume" else verdict.state
        numbers = [count(facts[key]) if key in facts else "" for key in ("params", "tokens", "flops")]
        time_text = "" if verdict.state == "hit" else span(seconds) if seconds is not None else "?"
        rows.append([name, state, *numbers, time_text, count(disk) + "B" if disk else "", verdict.why])
    table(["stage", "", "params", "tokens", "FLOPs", "time", "disk", "why"], rows)
    for name, why in made.left_out.items():
        print(f"left out: {name} ({why})")
    for name, seconds in lost.items():
        if seconds >= 60:
            where = made.runtime.base_dir / name
            print(f"{span(seconds)} of finished {name} would stay in {where} but not be used")
    if any(verdict.state != "hit" and costs[name].facts.get("flops") for name, verdict in verdicts.items()):
        print(f"training that has not been timed yet is reckoned with {rate}")
    other = by_other_code(made, verdicts)
    if other:
        print(
            f"made by another state of the code, and kept: {', '.join(other)} (--rerun makes a stage again)"
        )
    known = sum(cost.seconds or 0.0 for cost in costs.values())
    unknown = sum(v.state != "hit" and costs[n].seconds is None for n, v in verdicts.items())
    more = f", and {unknown} stages that have not been timed yet" if unknown else ""
    print(
        f"{made.title}: {span(known)} by what is known{more}. Nothing was run."
        if known or unknown
        else "All done."
    )
    print(f"next: {command('run', profile, set_, rerun, until, base_dir)}")
