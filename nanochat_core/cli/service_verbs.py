"""`nanochat up` and `nanochat down`: Prefect, standing by on this machine."""

import sys
from typing import Annotated

import typer

from nanochat_core.cli.options import HOME, BaseDir, resolved, say, usable, with_base


def up(
    base_dir: BaseDir = HOME,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="of the Prefect server and its UI; 4200 if none is named"),
    ] = None,
) -> None:
    """Start the Prefect server, a worker and the reconciler, and register a deployment for each profile."""
    from flows import services

    url = services.up(usable(base_dir), port)
    say(f"up: {url.removesuffix('/api')}  (logs in {services.folder(resolved(base_dir))})", out=sys.stdout)
    say(f"next: export PREFECT_API_URL={url}; prefect deployment run speedrun/cpu-demo", out=sys.stdout)


def down(base_dir: BaseDir = HOME) -> None:
    """End what `up` started. A run at work saves, and goes on after the next `up`."""
    from flows import services

    ended = services.down(resolved(base_dir))
    say(f"down: {', '.join(ended)}" if ended else "nothing was up", out=sys.stdout)
    say(f"next: {with_base('nanochat up', base_dir)}", out=sys.stdout)
