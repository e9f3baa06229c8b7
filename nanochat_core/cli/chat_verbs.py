"""A trained model put to use: `nanochat chat`, `nanochat serve` and `nanochat export`."""

import errno
import shlex
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_core.cli.options import HOME, BaseDir, Device, Model, resolved, say

if TYPE_CHECKING:
    from nanochat_core.infer.load import Loaded


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
    from nanochat_core.runner.models import load

    def loaded(name: str | None) -> "Loaded":
        return load(name or model, device=device, base_dir=base_dir)

    run_terminal(
        loaded, prompt=prompt, temperature=temperature, top_k=top_k or None, max_tokens=max_tokens, seed=seed
    )


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
    from nanochat_core.runner.models import load

    loaded = load(model, device=device, base_dir=base_dir)
    serve(loaded, host=host, port=port, token=token, say=partial(say, out=sys.stdout))


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def export(
    model: Annotated[str, typer.Argument(help="a stage of the latest run (sft), or a directory")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="where to write it: new, empty, or an export")
    ],
    dtype: Annotated[Dtype, typer.Option(help="of the weights; bfloat16 is half the size")] = Dtype.float32,
    name: Annotated[str | None, typer.Option(help="the model card's title; DIR's name if not given")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="send it to the Hugging Face hub too; wants HF_TOKEN")
    ] = None,
    base_dir: BaseDir = HOME,
) -> None:
    """Write a model as a directory that others can read: safetensors, tokenizer.json, settings, model card.

    A `seed` model opens with transformers' AutoModelForCausalLM, a `modern` one with `nanochat chat DIR`.
    There is no GGUF: llama.cpp's converter does not know the architecture.
    """
    source = model_directory(model, base_dir)
    taken = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if taken and (not (directory / "generation_config.json").is_file() or (directory / "job.json").exists()):
        raise ValueError(f"{directory} holds something else; give a new or an empty directory")
    import torch

    from nanochat_core.infer.exported import export, is_exported, push_to_hub
    from nanochat_core.infer.load import tokenizer_directory
    from nanochat_core.infer.model_card import measured
    from nanochat_core.runner.plan import latest_table

    tokenizer = source if is_exported(source) else tokenizer_directory(source)
    rows = latest_table(resolved(base_dir))
    results = measured(source, [row for row in rows if rows[row].measures])
    title = name or directory.resolve().name
    params = export(
        source, tokenizer, directory, dtype=getattr(torch, dtype.value), results=results, name=title
    )
    say(f"{params:,} parameters in {directory}; talk to it: nanochat chat {shlex.quote(str(directory))}")
    if push is not None:
        say(f"sent to {push_to_hub(directory, push)}")


def model_directory(model: str | None, base_dir: Path) -> Path:
    from nanochat_core.runner.status import find_model

    return find_model(resolved(base_dir), model)


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
