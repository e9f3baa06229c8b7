"""Data of your own: `nanochat repackage` makes shards of it, `nanochat identity` has talks written."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.verbs.shared import HOME, BaseDir, say, usable

INTERRUPTED = 130


def repackage(
    source: Annotated[
        str,
        typer.Argument(help="a file, folder, glob or URL of parquet, jsonl or txt, or OWNER/NAME of the hub"),
    ],
    out: Annotated[Path, typer.Argument(help="the folder to fill with shards")],
    column: Annotated[str, typer.Option(help="the column or field that holds the text")] = "text",
    config: Annotated[str | None, typer.Option(help="of a data set on the hub")] = None,
    split: Annotated[str, typer.Option(help="of a data set on the hub")] = "train",
    revision: Annotated[str | None, typer.Option(help="of a data set on the hub; a commit pins it")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the shuffle")] = 42,
    shard_chars: Annotated[int, typer.Option(min=1, help="characters of one shard")] = 250_000_000,
    base_dir: BaseDir = HOME,
) -> None:
    """Make shuffled shards of your own text, to pretrain on; what was begun before goes on."""
    from flows import server

    folder = usable(out)
    server.prepare(usable(base_dir))
    from flows.repackage import repackage, terminal

    terminal.set(say)
    try:
        made = repackage(source, str(folder), column, config, split, revision, seed, shard_chars)
    except KeyboardInterrupt:
        say("interrupted; what was done is kept. To go on: the same command")
        raise typer.Exit(INTERRUPTED) from None
    shards = "one shard" if made["train_shards"] == 1 else f"{made['train_shards']} shards"
    say(
        f"done: {made['documents']:,} documents in {shards} and "
        f"{made['validation_documents']:,} for validation, in {folder}",
        out=sys.stdout,
    )
    where = shlex.quote(str(folder))
    say(
        f"next: nanochat run PROFILE --set shards_head.source={where} --set shards.source={where}", sys.stdout
    )
