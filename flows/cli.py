"""The `nanochat` command: from one line to a trained model, its report and a chat with it.

What a verb needs is imported inside it: `nanochat --help` answers at once, and only `run` knows of Prefect.
"""

import errno
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from nanochat_core.chat.load import Loaded
    from nanochat_core.plan import Plan, Verdict
    from nanochat_core.status import Standing

INTERRUPTED = 130
DEAR_SECONDS = 3600.0  # finished training that a changed recipe may leave unused without a question

app = typer.Typer(
    help="Train your own ChatGPT, stage by stage, on this machine. Each stage is kept, checked, resumable.",
    epilog="Start with: nanochat run cpu-demo",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Profile = Annotated[
    str, typer.Argument(help="a profile's name (cpu-demo, dgx-spark, ...) or a .toml file of yours")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.KEY=VALUE", help="change one key of the recipe; repeat for more"),
]
Reruns = Annotated[
    list[str] | None,
    typer.Option("--rerun", metavar="STAGE", help="make this stage again, and what follows; repeat for more"),
]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="stop after this stage")]
BaseDir = Annotated[
    Path,
    typer.Option(envvar="NANOCHAT_BASE_DIR", metavar="DIR", help="where everything is kept"),
]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask before hours of finished training go unused")]
Model = Annotated[str | None, typer.Argument(help="a stage of the latest run (sft), or a directory")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document instead of a table")]
HOME = Path("~/.cache/nanochat")


@app.command()
def run(
    profile: Profile,
    set_: Sets = None,
    rerun: Reruns = None,
    until: Until = None,
    base_dir: BaseDir = HOME,
    yes: Yes = False,
) -> None:
    """Run a profile's whole pipeline here and now; what is done already is not done again."""
    from flows import server
    from nanochat_core.launch import StageFailed, made_by
    from nanochat_core.plan import explain, remember
    from nanochat_core.stage import Interrupted

    plan = load_plan(profile, set_, rerun, until, usable(base_dir))
    verdicts = explain(plan)
    guard_cost(plan, verdicts, yes)
    token = str(uuid.uuid4())
    try:
        if all(verdict.state == "hit" for verdict in verdicts.values()) and not server.configured():
            remember(plan)  # nothing to do, and nobody to tell
            say(f"cached     {', '.join(plan.jobs)}")
        else:
            server.prepare(plan.runtime.base_dir)
            from flows.speedrun import run_here

            run_here(plan, set_ or [], rerun or [], until, token)
    except (KeyboardInterrupt, Interrupted, StageFailed) as end:
        left = [name for name in rerun or [] if not made_by(plan.jobs[name].path, token)]
        stopped(end, command("run", profile, set_, left, until, base_dir))
    model = next((row for row in ("rl", "sft") if row in plan.jobs), None)
    if "report" not in plan.jobs:
        say(
            f"done, until {until}. Go on: {command('run', profile, set_, None, None, base_dir)}",
            out=sys.stdout,
        )
        return
    if model is not None:
        say(f"talk to it: {with_base('nanochat chat ' + model, base_dir)}", out=sys.stdout)
    say(f"report: {plan.jobs['report'].path / 'report.md'}", out=sys.stdout)


@app.command()
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


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="a row of the table, for example pretrain")],
    profile: Profile,
    set_: Sets = None,
    rerun: Reruns = None,
    base_dir: BaseDir = HOME,
    yes: Yes = False,
) -> None:
    """Run one stage without Prefect; what it reads and is not there is made first."""
    from nanochat_core.launch import StageFailed, launch, result_of
    from nanochat_core.plan import explain, needed, remember
    from nanochat_core.progress import Terminal
    from nanochat_core.stage import Interrupted

    plan = load_plan(profile, set_, rerun, name, usable(base_dir))
    if name not in plan.jobs:
        raise ValueError(f"there is no {name} to run: {plan.left_out[name]}")
    verdicts = explain(plan)
    rows = needed(plan, name, verdicts)
    guard_cost(plan, {row: verdicts[row] for row in rows}, yes)
    remember(plan)
    terminal, token = Terminal(), str(uuid.uuid4())
    again = f"nanochat stage {name} {profile}" + options(set_, None, None, base_dir)
    try:
        for row in rows:
            why = verdicts[row].why if row == name else f"{verdicts[row].why}; needed for {name}"
            with terminal.stage(row, why, partial(result_of, plan.jobs[row].path)) as see:
                launch(plan, row, see, rerun=token)
    except (KeyboardInterrupt, Interrupted, StageFailed) as end:
        stopped(end, again)
    if not rows:
        say(f"cached     {name}")
    say(f"done: {plan.jobs[name].path}", out=sys.stdout)
    say(f"next: {command('run', profile, set_, None, None, base_dir)}", out=sys.stdout)


@app.command()
def status(
    profile: Annotated[str | None, typer.Argument(help="a profile; the latest run if none is named")] = None,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Say where a run stands: which stages are done, which is at work, its step, loss and time left."""
    from nanochat_core.plan import latest_profile, latest_run
    from nanochat_core.progress import describe, headline, span
    from nanochat_core.status import standings

    root = resolved(base_dir)
    name = profile or latest_profile(root)
    jobs = latest_run(root, name) if name else None
    if name is None or jobs is None:
        what = f"run of {profile}" if profile else "run"
        start = with_base(f"nanochat run {profile or 'cpu-demo'}", base_dir)
        raise ValueError(f"there is no {what} in {root} yet; try: {start}")
    found = standings(root, jobs)
    if as_json:
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
        print(json.dumps({"profile": name, "stages": stages}, indent=1))
        return

    def words(s: "Standing") -> str:
        if s.state == "done":
            return headline(s.metrics or {})
        return "  ".join(part for part in (describe(s.row, s.left) if s.row else "", s.note) if part)

    table(
        ["stage", "state", "took", ""],
        [[s.stage, s.state, span(s.seconds) if s.seconds is not None else "", words(s)] for s in found],
    )
    states = {s.state for s in found}
    if states == {"done"}:
        print(f"next: {with_base('nanochat chat', base_dir)}")
    elif "running" in states:
        print(f"at work; look again: {with_base(f'nanochat status {name}', base_dir)}")
    else:
        print(f"to go on: {with_base(f'nanochat run {name}', base_dir)} (with the same --set options)")


@app.command()
def verify(
    profile: Profile,
    set_: Sets = None,
    until: Until = None,
    discard: Annotated[
        bool, typer.Option("--discard", help="set damaged artefacts aside; the next run makes them again")
    ] = False,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Check the hash of every file of every artefact."""
    from nanochat_core import store

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


@app.command()
def gc(
    keep: Annotated[int, typer.Option(min=0, help="earlier artefacts to keep of each stage")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    base_dir: BaseDir = HOME,
) -> None:
    """Delete artefacts that no profile's latest run uses any more."""
    from nanochat_core.progress import count
    from nanochat_core.retention import clear, unused

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


@app.command()
def report(
    profile: Annotated[str | None, typer.Argument(help="a profile; the latest run if none is named")] = None,
    base_dir: BaseDir = HOME,
    open_: Annotated[bool, typer.Option("--open", help="show report.html in the browser")] = False,
) -> None:
    """Print the report of a profile's latest run."""
    from nanochat_core import store
    from nanochat_core.plan import latest_run

    root = resolved(base_dir)
    jobs = latest_run(root, profile) or {}
    directory = root / "report" / jobs.get("report", "none")
    if "report" not in jobs or store.verify(directory, root) is None:
        make = with_base(f"nanochat run {profile or 'cpu-demo'}", base_dir)
        raise ValueError(f"there is no report yet; make it: {make}")
    print((directory / "report.md").read_text())
    if open_:
        import webbrowser

        webbrowser.open((directory / "report.html").as_uri())
    print(f"talk to it: {with_base('nanochat chat', base_dir)}")
    print(f"report: {directory / 'report.html'}")


@app.command()
def chat(
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="ask this one thing, print the answer")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest word")] = 0.6,
    top_k: Annotated[int, typer.Option(min=0, help="of the likeliest tokens only; 0 for all")] = 50,
    max_tokens: Annotated[int, typer.Option(min=1, help="of one answer")] = 256,
    seed: Annotated[int | None, typer.Option(help="the same answer each time")] = None,
    device: Device = "auto",
    base_dir: BaseDir = HOME,
) -> None:
    """Talk to a trained model in the terminal."""
    model_directory(model, base_dir)  # before torch is loaded
    from nanochat_core.chat.terminal import run_terminal

    def load(name: str | None) -> "Loaded":
        return loaded(name or model, device, base_dir)

    run_terminal(
        load, prompt=prompt, temperature=temperature, top_k=top_k or None, max_tokens=max_tokens, seed=seed
    )


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be reached from other machines")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one")] = 8000,
    token: Annotated[str | None, typer.Option(envvar="NANOCHAT_TOKEN", help="ask callers for this")] = None,
    device: Device = "auto",
    base_dir: BaseDir = HOME,
) -> None:
    """Talk to a trained model in the browser, or through an OpenAI-style API."""
    model_directory(model, base_dir)
    free_port(host, port)  # before a model is loaded for it
    from nanochat_core.chat.web import serve

    serve(
        loaded(model, device, base_dir), host=host, port=port, token=token, say=partial(say, out=sys.stdout)
    )


@app.command()
def up(
    base_dir: BaseDir = HOME,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the Prefect server and its UI")] = 4200,
) -> None:
    """Start the Prefect server, a worker and the reconciler, and register a deployment for each profile."""
    from flows import services

    url = services.up(usable(base_dir), port)
    say(f"up: {url.removesuffix('/api')}  (logs in {services.folder(resolved(base_dir))})", out=sys.stdout)
    say(f"next: export PREFECT_API_URL={url}; prefect deployment run speedrun/cpu-demo", out=sys.stdout)


@app.command()
def down(base_dir: BaseDir = HOME) -> None:
    """End what `up` started. A run at work saves, and goes on after the next `up`."""
    from flows import services

    say("down" if services.down(resolved(base_dir)) else "nothing was up", out=sys.stdout)
    say(f"next: {with_base('nanochat up', base_dir)}", out=sys.stdout)


# What the verbs share.


def load_plan(
    profile: str, sets: list[str] | None, rerun: list[str] | None, until: str | None, base_dir: Path
) -> "Plan":
    from nanochat_core.plan import load

    return load(profile, sets or [], base_dir=base_dir, rerun=rerun or [], until=until)


def resolved(base_dir: Path) -> Path:
    return base_dir.expanduser().absolute()


def usable(base_dir: Path) -> Path:
    """The base directory, made if need be and proven to take a file, before anything relies on it."""
    path = resolved(base_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as f:
            f.write(b"\0" * 2**16)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "it is not a directory"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full"
        else:
            reason = f"nothing can be written there ({os.strerror(error.errno or 0)})"
        raise ValueError(
            f"{path} cannot be the base directory: {reason}; choose one with --base-dir"
        ) from None
    return path


def guard_cost(plan: "Plan", verdicts: "dict[str, Verdict]", yes: bool) -> None:
    """Before hours of finished training go unused: say so, and ask."""
    from nanochat_core.plan import wasted
    from nanochat_core.progress import span

    lost = {name: seconds for name, seconds in wasted(plan, verdicts).items() if name in verdicts}
    if sum(lost.values()) <= DEAR_SECONDS:
        return
    for name, seconds in lost.items():
        say(f"{name} runs again: {verdicts[name].why}; {span(seconds)} of work stay in "
            f"{plan.runtime.base_dir / name} but are not used")  # fmt: skip
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("that is more than an hour of finished work; say --yes if it is meant")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(2)


def stopped(end: BaseException, again: str) -> NoReturn:
    """The last words of a run that did not reach its end, and the code to leave with."""
    from nanochat_core.launch import StageFailed

    if isinstance(end, StageFailed):
        say(f"error: {end}")
        say(f"its log: {end.log}")
        say(f"when that is put right: {again}")
        raise typer.Exit(1) from None
    say(f"interrupted; what was done is kept. To go on: {again}")
    raise typer.Exit(INTERRUPTED) from None


def model_directory(model: str | None, base_dir: Path) -> Path:
    from nanochat_core.plan import latest_run
    from nanochat_core.status import find_model

    root = resolved(base_dir)
    return find_model(root, model, latest_run(root))


def loaded(model: str | None, device: str, base_dir: Path) -> "Loaded":
    """A MODEL ready to talk, under the name the user knows it by."""
    import torch

    from nanochat_core.chat.load import Loaded, load_chat

    directory = model_directory(model, base_dir)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = directory.parent.name if (directory / "job.json").exists() else directory.name
    return Loaded(name, *load_chat(directory, device))


def free_port(host: str, port: int) -> None:
    """Refuse a port that cannot be had."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as error:
            what = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ValueError(f"port {port} of {host} {what}; choose another with --port") from None


def options(sets: list[str] | None, rerun: list[str] | None, until: str | None, base_dir: Path) -> str:
    words = [word for text in sets or [] for word in ("--set", text)]
    words += [word for text in rerun or [] for word in ("--rerun", text)]
    words += ["--until", until] if until else []
    words += ["--base-dir", str(base_dir)] if named(base_dir) else []
    return "".join(" " + shlex.quote(word) for word in words)


def command(
    verb: str,
    profile: str,
    sets: list[str] | None,
    rerun: list[str] | None,
    until: str | None,
    base_dir: Path,
) -> str:
    """A command line that means what this one meant."""
    return f"nanochat {verb} {shlex.quote(profile)}" + options(sets, rerun, until, base_dir)


def with_base(text: str, base_dir: Path) -> str:
    return f"{text} --base-dir {shlex.quote(str(base_dir))}" if named(base_dir) else text


def named(base_dir: Path) -> bool:
    """Whether a next command has to name the base directory too."""
    return base_dir != HOME and str(base_dir) != os.environ.get("NANOCHAT_BASE_DIR")


def table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be; the last one runs on."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    for row in [head, *rows]:
        print(
            "  ".join(
                [cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + row[-1:]
            ).rstrip()
        )


def say(text: str, out: Any = None) -> None:
    print(text, file=out or sys.stderr, flush=True)


def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command. What the user can mend is told in one line; anything else is a traceback to report."""
    signal.signal(signal.SIGINT, interrupt)  # a shell that starts us in the background has it ignored
    signal.signal(signal.SIGTERM, interrupt)  # ends as Ctrl-C does, with a checkpoint
    try:
        app()
    except ValueError as error:
        say(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        say(
            "error: the disk is full; free some space and run the same command to go on"
            if full
            else f"error: {error}"
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
