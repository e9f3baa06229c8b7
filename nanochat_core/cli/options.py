"""What the verbs share: their options, where things are kept, and the words they end with."""

import errno
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nanochat_core.runner.plan import Plan

Profile = Annotated[
    str, typer.Argument(help="a profile's name (cpu-demo, dgx-spark, ...) or a .toml file of yours")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.KEY=VALUE", help="change one key of the recipe; repeat for more"),
]
Stages = Annotated[
    list[str] | None,
    typer.Option(
        "--stage", metavar="FILE.py:NAME", help="add a stage out of a file of yours; repeat for more"
    ),
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
STAGES = "profile.stages="


def load_plan(
    profile: str, sets: list[str] | None, rerun: list[str] | None, until: str | None, base_dir: Path
) -> "Plan":
    from nanochat_core.runner.plan import load

    return load(profile, sets or [], base_dir=base_dir, rerun=rerun or [], until=until)


def with_stages(sets: list[str] | None, stages: list[str] | None) -> list[str] | None:
    """--stage is a --set of the profile's `stages`, with the file named in full."""
    from nanochat_core.runner.table import located

    if not stages:
        return sets
    return [*(sets or []), STAGES + json.dumps([located(source, Path()) for source in stages])]


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


def options(sets: list[str] | None, rerun: list[str] | None, until: str | None, base_dir: Path) -> str:
    words: list[str] = []
    for text in sets or []:
        own = json.loads(text.removeprefix(STAGES)) if text.startswith(STAGES) else None
        words += ["--set", text] if own is None else [word for one in own for word in ("--stage", one)]
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
