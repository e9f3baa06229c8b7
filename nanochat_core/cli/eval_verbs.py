"""`nanochat core`: the CORE benchmark for any base model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nanochat_core.cli.options import HOME, AsJson, BaseDir, Device, resolved, say, table, with_base


def core(
    model: Annotated[
        str | None,
        typer.Argument(help="a stage (pretrain), a directory, or the name of one that transformers knows"),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CORE's files; else those of the latest run")
    ] = None,
    max_per_task: Annotated[int | None, typer.Option(min=1, help="examples of each task; else all")] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="for the answers; what is there is not done again"),
    ] = None,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Evaluate a base model on the tasks of CORE: ours, or any causal language model of transformers."""
    root = resolved(base_dir)
    files = bundle.expanduser() if bundle is not None else bundle_of_latest_run(root, base_dir)
    name = named_model(root, model)

    from nanochat_core.eval import bench
    from nanochat_core.report.published import core_name

    where = root / "core" if out is None else out.expanduser()
    done = bench.core_of(name, files, where, device, max_per_task, say, out is None)
    if as_json:
        tasks = {
            s.label: {"accuracy": s.accuracy, "centered": s.centered, "examples": s.examples}
            for s in done.scores
        }
        document = {"model": name, "core": done.core, "tasks": tasks, "directory": str(done.directory)}
        print(json.dumps(document, indent=1))
        return
    rows = [[s.label, str(s.examples), f"{s.accuracy:.4f}", f"{s.centered:.4f}"] for s in done.scores]
    name_of_mean = core_name(s.label for s in done.scores)
    table(["task", "examples", "accuracy", "centered"], [*rows, [name_of_mean, "", "", f"{done.core:.4f}"]])
    print(f"answers: {done.directory}")
    print(f"what the run's own model came to: {with_base('nanochat report', base_dir)}")


def named_model(root: Path, model: str | None) -> str:
    """The directory of a stage of the latest run, or the name as it is, for transformers to find; the base
    model if none is named."""
    from nanochat_core.runner.plan import latest_table
    from nanochat_core.runner.status import find_model

    if model is not None and Path(model).expanduser().is_dir():
        return str(Path(model).expanduser())
    table = latest_table(root)
    model = model or next(row for row in table if table[row].trains)
    return str(find_model(root, model)) if model in table else model


def bundle_of_latest_run(root: Path, base_dir: Path) -> Path:
    """Where the latest run's assets have CORE's files."""
    from nanochat_core.runner.plan import latest_run
    from nanochat_core.stages.assets import BUNDLE

    places = (root / row / name / BUNDLE for row, name in (latest_run(root) or {}).items())
    files = next((place for place in places if place.is_dir()), None)
    if files is None:
        make = with_base("nanochat stage assets cpu-demo", base_dir)
        raise ValueError(f"there are no files of CORE in {root}; name them with --bundle DIR, or try: {make}")
    return files
