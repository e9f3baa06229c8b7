"""A trained model put to use: `nanochat chat` and `nanochat serve`."""

import errno
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.verbs.shared import HOME, BaseDir, Device, Model, resolved, say

if TYPE_CHECKING:
    from nanochat_core.chat.load import Loaded


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
