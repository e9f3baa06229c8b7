"""The `nanochat` command: from one line to a trained model, its report and a chat with it.

What a verb needs is imported inside it: `nanochat --help` answers at once, and only `run` knows of Prefect.
"""

import errno
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from nanochat_core.cli import (
    artifact_verbs,
    audit_verb,
    chat_verbs,
    data_verbs,
    doctor_verb,
    eval_verbs,
    install_verb,
    mirror_verbs,
    plan_verb,
    run_verbs,
    service_verbs,
)
from nanochat_core.cli.options import say
from nanochat_core.machine import proxy

VERBS = (
    run_verbs.run,
    plan_verb.plan,
    doctor_verb.doctor,
    run_verbs.stage,
    data_verbs.repackage,
    data_verbs.identity,
    artifact_verbs.status,
    artifact_verbs.verify,
    audit_verb.audit,
    artifact_verbs.gc,
    artifact_verbs.report,
    artifact_verbs.compare,
    eval_verbs.core,
    chat_verbs.chat,
    chat_verbs.serve,
    chat_verbs.export,
    service_verbs.up,
    service_verbs.down,
    install_verb.install_services,
    mirror_verbs.mirror,
    mirror_verbs.join,
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
    os.environ.update(proxy.direct(os.environ))  # Prefect's clients read it when they are made
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
