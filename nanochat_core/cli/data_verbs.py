"""Data of your own: `nanochat repackage` makes shards of it, `nanochat identity` has talks written."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from nanochat_core.cli.options import HOME, BaseDir, say, usable

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
    from flows.repackage_flow import repackage, terminal

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


def identity(
    out: Annotated[
        Path, typer.Argument(help="a jsonl file; conversations are added to those that are there")
    ],
    base_url: Annotated[str, typer.Option(help="an OpenAI-compatible endpoint: http://HOST:PORT/v1")],
    model: Annotated[str, typer.Option(help="the model there that writes")],
    count: Annotated[int, typer.Option(min=1, help="conversations in the file in the end")] = 1000,
    name: Annotated[str, typer.Option(help="of your model")] = "nanochat",
    persona: Annotated[
        Path | None, typer.Option(help="a text file that says who your model is; {name} stands for its name")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="requests at once")] = 4,
    seed: Annotated[int, typer.Option(help="of the prompts")] = 42,
) -> None:
    """Have a larger model write conversations about who yours is. A key comes from NANOCHAT_API_KEY or
    OPENAI_API_KEY."""
    from nanochat_core.sources.persona import PERSONA
    from nanochat_core.sources.synthesis import Order, synthesize

    if persona is not None and not persona.is_file():
        raise ValueError(f"there is no file {persona}: --persona names a text that says who the model is")
    text = persona.read_text(encoding="utf-8") if persona else PERSONA
    order = Order(base_url, model, count, name, text, seed, workers)
    out = out.expanduser().absolute()

    def tell(done: int, wanted: int, note: str) -> None:
        if note:
            say(f"not used: {note}")
        elif done % 10 == 0 or done == wanted:
            say(f"{done} of {wanted} conversations")

    try:
        new = synthesize(order, out, tell)
    except KeyboardInterrupt:
        say("interrupted; what was written is kept. To go on: the same command")
        raise typer.Exit(INTERRUPTED) from None
    say(f"done: {new} new conversations in {out}", out=sys.stdout)
    say(f"next: nanochat run PROFILE --set assets.identity={shlex.quote(str(out))}", out=sys.stdout)
