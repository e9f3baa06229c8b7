"""The `nanochat` command: from one line to a trained model, its report and a chat with it.

What a verb needs is imported inside it: `nanochat --help` answers at once, and only `run` knows of Prefect.
"""

import errno
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from flows.verbs import data, doctor, elsewhere, evaluate, install, kept, plan, run, services, talk
from flows.verbs.shared import say

VERBS = (
    run.run,
    plan.plan,
    doctor.doctor,
    run.stage,
    data.repackage,
    data.identity,
    kept.status,
    kept.verify,
    kept.gc,
    kept.report,
    kept.compare,
    evaluate.core,
    talk.chat,
    talk.serve,
    talk.export,
    services.up,
    services.down,
    install.install_services,
    elsewhere.mirror,
    elsewhere.join,
)

app = typer.Typer(
    help="Train your own ChatGPT, stage by stage, on this machine. Each stage is kept, checked, resumable.",
    epilog="Start with: nanochat run cpu-demo",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)


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
