"""`nanochat install-services`: what `up` starts, at every boot."""

import sys
from typing import Annotated

import typer

from nanochat_core.cli.options import HOME, BaseDir, resolved, say, usable, with_base


def install_services(
    system: Annotated[
        bool, typer.Option("--system/--user", help="for the machine (as root), or for your own account")
    ] = False,
    user_name: Annotated[str | None, typer.Option(metavar="NAME", help="who the services run as")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the Prefect server and its UI")] = 4200,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would be done")] = False,
    base_dir: BaseDir = HOME,
) -> None:
    """Have systemd start the Prefect server, the worker and the reconciler at boot; each step is shown."""
    from nanochat_core.machine.systemd import handed_over, homed, install, show, steps, whom

    user = whom(system, user_name, only_show=dry_run)
    root = resolved(homed(base_dir, user) if system else base_dir)
    if not dry_run:
        root = handed_over(root, user, usable) if system else usable(root)
    found = steps(root, port, system=system, user=user)
    if dry_run:
        show(found, print)
        say("nothing was done; next: the same without --dry-run", out=sys.stdout)
        return
    install(found, print)
    log = f"journalctl {'' if system else '--user '}-u nanochat"
    say(f"next: {with_base('nanochat doctor', base_dir)}; its log: {log}", out=sys.stdout)
