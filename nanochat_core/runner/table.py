"""The table of a plan: the built-in rows, optional ones, and stages out of a user's own files."""

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat_core.artifacts.stage import Stage
from nanochat_core.pipeline import STAGES

Table = dict[str, Stage]
NO_STAGES = ("runtime", "profile")  # sections of a profile that are no stage's


class UsageError(ValueError):
    """The user asked for something that does not exist or does not fit; the message says what would."""


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no {what} called {name!r}; {hint}there are: {', '.join(known)}"


def located(source: str, folder: Path) -> str:
    """A source of stages with its file named in full; a relative one is in the folder."""
    file, colon, name = source.partition(":")
    return f"{(folder / Path(file).expanduser()).absolute()}{colon}{name}" if file.endswith(".py") else source


def load_table(sources: Sequence[str] = ()) -> Table:
    """The rows by name. A source is an optional row's name, FILE.py:NAME for a row to add, or FILE.py for a
    table of one's own in place of the built-in one."""
    whole = [source for source in sources if source.endswith(".py")]
    rows = list(STAGES) if not whole else [row for source in whole for row in _own_table(Path(source))]
    optional = [row.name for row in rows if row.optional]
    wanted = [source for source in sources if ".py" not in source]
    for name in wanted:
        if name not in optional:
            raise UsageError(unknown("optional stage", name, optional))
    rows = [row for row in rows if not row.optional or row.name in wanted]
    added: set[str] = set()
    for source in sources:
        if ".py:" in source:
            _add(rows, _own_stage(source), added)
    return {row.name: row for row in rows}


def _own_stage(source: str) -> Stage:
    file, _, name = source.rpartition(":")
    if not name.isidentifier() or name in NO_STAGES:
        raise UsageError(f"{source}: {name!r} cannot be a stage's name; use letters, digits and underscores")
    module, digest = _load(Path(file))
    for wanted in ("Config", "run", "ROW"):
        if not hasattr(module, wanted):
            raise UsageError(f"{file} has no {wanted}; a stage's file has Config, run and ROW")
    try:
        return Stage(name, module, **module.ROW, file=Path(file), digest=digest)
    except TypeError as error:
        raise UsageError(f"{file}, ROW: {error}") from None


def _own_table(file: Path) -> list[Stage]:
    module, digest = _load(file)
    if not hasattr(module, "STAGES"):
        raise UsageError(f"{file} has no STAGES; to add one stage of it, write {file.name}:NAME")
    return [replace(row, file=file, digest=digest) for row in module.STAGES]


def _add(rows: list[Stage], own: Stage, added: set[str]) -> None:
    """Put a row right behind the last one that it reads, and behind other added ones that are there."""
    names = [row.name for row in rows]
    if own.name in names:
        raise UsageError(f"{own.file}: there is a stage called {own.name} already; give it another name")
    reads = [name for names in own.reads.values() for name in ((names,) if isinstance(names, str) else names)]
    for name in reads:
        if name not in names:
            raise UsageError(f"{own.file}, ROW reads: {unknown('stage', name, names)}")
    at = max((names.index(name) + 1 for name in reads), default=0)
    while at < len(rows) and rows[at].name in added:
        at += 1
    rows.insert(at, own)
    added.add(own.name)


def _load(path: Path) -> tuple[Any, str]:
    """A user's module, and the digest of its source."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the stage file {path} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(source).hexdigest()[:20]
    name = f"{path.stem}_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where pydantic and dataclasses look annotations up
        try:
            exec(compile(source, path, "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[name]
            raise UsageError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return sys.modules[name], digest
