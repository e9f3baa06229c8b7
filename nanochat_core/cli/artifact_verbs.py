"""What lies on the disk: `nanochat status`, `verify`, `gc` and `report`."""

import json
import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_core.cli.options import (
    HOME,
    AsJson,
    BaseDir,
    Profile,
    Sets,
    Stages,
    Until,
    command,
    load_plan,
    resolved,
    table,
    with_base,
    with_stages,
)

if TYPE_CHECKING:
    from nanochat_core.runner.status import Standing


def status(
    profile: Annotated[str | None, typer.Argument(help="a profile; the latest run if none is named")] = None,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Say where a run stands, by the disk: which stages are done, which is at work, its step, loss and time
    left; and then what Prefect says of its runs, if a server answers."""
    from flows.services import running
    from nanochat_core.artifacts.progress import describe, span
    from nanochat_core.report.headline import headline
    from nanochat_core.runner.plan import latest_profile, latest_run
    from nanochat_core.runner.status import standings

    root = resolved(base_dir)
    name = profile or latest_profile(root)
    jobs = latest_run(root, name) if name else None
    if name is None or jobs is None:
        what = f"run of {profile}" if profile else "run"
        start = with_base(f"nanochat run {profile or 'cpu-demo'}", base_dir)
        raise ValueError(f"there is no {what} in {root} yet; try: {start}")
    found = standings(root, jobs)
    runs = running(root)
    if as_json:
        in_prefect = {run: str(said) for run, said in runs.items()}
        stages = {
            s.stage: {
                "state": s.state,
                "directory": str(s.directory),
                "seconds": s.seconds,
                "metrics": s.metrics,
                "progress": dict(s.row) if s.row else None,
                "seconds_left": s.left,
                "note": s.note,
            }
            for s in found
        }
        print(json.dumps({"profile": name, "stages": stages, "prefect": in_prefect}, indent=1))
        return

    def words(s: "Standing") -> str:
        if s.state == "done":
            return headline(s.metrics or {})
        return "  ".join(part for part in (describe(s.row, s.left) if s.row else "", s.note) if part)

    table(
        ["stage", "state", "took", ""],
        [[s.stage, s.state, span(s.seconds) if s.seconds is not None else "", words(s)] for s in found],
    )
    for run, said in runs.items():
        print(f"in Prefect: {run}  {said}")
    states = {s.state for s in found}
    mine = [said for said in runs.values() if said.profile == name]  # at work, or between two stages
    if states == {"done"}:
        print(f"next: {with_base('nanochat chat', base_dir)}")
    elif "running" in states or mine:
        print(f"at work; look again: {with_base(f'nanochat status {name}', base_dir)}")
        for one in mine:
            print(f"to end it: PREFECT_API_URL={one.api} prefect flow-run cancel {one.id}")
    else:
        print(f"to go on: {with_base(f'nanochat run {name}', base_dir)} (with the same --set options)")


def verify(
    profile: Profile,
    set_: Sets = None,
    stage_: Stages = None,
    until: Until = None,
    discard: Annotated[
        bool, typer.Option("--discard", help="set damaged artefacts aside; the next run makes them again")
    ] = False,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Check the hash of every file of every artefact."""
    from nanochat_core.artifacts import store

    set_ = with_stages(set_, stage_)
    made = load_plan(profile, set_, None, until, resolved(base_dir))
    rows: dict[str, str] = {}
    for name, job in made.jobs.items():
        try:
            result = store.verify(job.path, made.runtime.base_dir, hashes=True)
            rows[name] = "not made yet" if result is None else "ok"
        except store.Damaged as damage:
            rows[name] = f"damaged: {damage}"
            if discard:
                aside = job.path.with_name(job.path.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                job.path.rename(aside)
    again = command("run", profile, set_, None, until, base_dir)
    damaged = [name for name, found in rows.items() if found.startswith("damaged")]
    if as_json:
        print(json.dumps({"profile": profile, "stages": rows, "damaged": damaged}, indent=1))
    else:
        table(["stage", ""], [[name, found] for name, found in rows.items()])
        if damaged and not discard:
            again = command("verify", profile, set_, None, until, base_dir) + " --discard"
        print(f"next: {again}")
    if damaged:
        raise typer.Exit(1)


def gc(
    keep: Annotated[int, typer.Option(min=0, help="earlier artefacts to keep of each stage")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    base_dir: BaseDir = HOME,
) -> None:
    """Delete artefacts that no profile's latest run uses any more."""
    from nanochat_core.artifacts.progress import count
    from nanochat_core.runner.gc import clear, unused

    found = list(unused(resolved(base_dir), keep))
    for one in found:
        if not dry_run:
            clear(one)
    table(["size", "", ""], [[count(one.bytes) + "B", str(one.directory), one.why] for one in found])
    total = count(sum(one.bytes for one in found)) + "B"
    if dry_run:
        print(f"{total} would be freed; next: {with_base(f'nanochat gc --keep {keep}', base_dir)}")
    else:
        print(f"{total} freed; next: {with_base('nanochat status', base_dir)}")


def report(
    profile: Annotated[str | None, typer.Argument(help="a profile; the latest run if none is named")] = None,
    base_dir: BaseDir = HOME,
    open_: Annotated[bool, typer.Option("--open", help="show report.html in the browser")] = False,
) -> None:
    """Print the report of a profile's latest run."""
    from nanochat_core.artifacts import store
    from nanochat_core.runner.plan import latest_run, latest_table

    root = resolved(base_dir)
    jobs, rows = latest_run(root, profile) or {}, latest_table(root, profile)
    directory = next((root / row / jobs[row] for row in rows if rows[row].reports and row in jobs), None)
    if directory is None or store.verify(directory, root) is None:
        make = with_base(f"nanochat run {profile or 'cpu-demo'}", base_dir)
        raise ValueError(f"there is no report yet; make it: {make}")
    print((directory / "report.md").read_text())
    if open_:
        import webbrowser

        webbrowser.open((directory / "report.html").as_uri())
    print(f"talk to it: {with_base('nanochat chat', base_dir)}")
    print(f"report: {directory / 'report.html'}")


def compare(
    first: Annotated[str, typer.Argument(help="a profile's latest run, or a report's directory")],
    second: Annotated[str, typer.Argument(help="another")],
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Show two runs side by side: what differed in their recipes, what came of it, and how long it took."""
    from nanochat_core.artifacts.progress import span
    from nanochat_core.runner.compare import differences, find_run

    root = resolved(base_dir)
    a, b = find_run(root, first), find_run(root, second)
    recipe = differences(a.recipe, b.recipe)
    metrics = {key: (a.metrics.get(key), b.metrics.get(key)) for key in {**a.metrics, **b.metrics}}
    seconds = {row: (a.seconds.get(row), b.seconds.get(row)) for row in {**a.seconds, **b.seconds}}
    if as_json:
        document = {"runs": [first, second], "recipe": recipe, "metrics": metrics, "seconds": seconds}
        print(json.dumps(document | {"commits": [a.commit, b.commit]}, indent=1))
        return

    def number(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4f}"
        return f"{value:,}" if isinstance(value, int) else str(value or "")

    def gain(pair: tuple[object, object]) -> str:
        one, other = pair
        known = isinstance(one, int | float) and isinstance(other, int | float)
        return f"{other - one:+.4f}" if known and one != other else ""  # type: ignore[operator]

    lines = [["commit", a.commit, b.commit, ""]]
    lines += [[f"recipe  {key}", repr(x), repr(y), ""] for key, (x, y) in recipe.items()]
    lines += [[f"result  {key}", number(x), number(y), gain((x, y))] for key, (x, y) in metrics.items()]
    for row, times in seconds.items():
        lines.append([f"time    {row}", *("" if s is None else span(s) for s in times), ""])
    table(["", first, second, "change"], lines)
    if not recipe:
        print("the recipes are the same")
    print(f"next: {with_base(f'nanochat report {first}', base_dir)}")
