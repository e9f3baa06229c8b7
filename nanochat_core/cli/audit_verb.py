"""`nanochat audit`: whether a training stage computed what its transcript says."""

import random
from typing import Annotated

import typer

from nanochat_core.cli.options import HOME, BaseDir, resolved, say


def audit(
    stage: Annotated[str, typer.Argument(help="a training stage of the latest run, for example pretrain")],
    profile: Annotated[str | None, typer.Argument(help="of which profile; the latest run's if none")] = None,
    count: Annotated[int, typer.Option("--stretches", min=1, help="how many to replay, drawn at random")] = 1,
    base_dir: BaseDir = HOME,
) -> None:
    """Replay stretches between kept checkpoints of a training stage and compare the bits with its transcript.

    Exits with 1 if they differ, or if the transcript or a checkpoint has been changed.
    """
    from nanochat_core.artifacts.store import Damaged, code_digest
    from nanochat_core.runner.audit import replay, stretches
    from nanochat_core.runner.plan import latest_run

    root = resolved(base_dir)
    name = (latest_run(root, profile) or {}).get(stage)
    if name is None:
        raise ValueError(f"there is no {stage} of {profile or 'the latest run'} in {root}")
    directory = root / stage / name
    try:
        kept = list(stretches(directory))
    except Damaged as damage:
        say(f"{stage}: {damage}")
        raise typer.Exit(1) from None
    if not kept:
        raise ValueError(
            f"{stage} has no two neighbouring checkpoints to replay between; "
            "have the next run keep some: --set runtime.audit_stretches=3"
        )
    wrong = 0
    for stretch in random.sample(kept, min(count, len(kept))):
        steps = f"{stage} steps {stretch.begin['step']} to {stretch.end['step']}"
        differ = replay(directory, root, stretch)
        wrong += bool(differ)
        print(f"{steps}: {', '.join(differ)} differ" if differ else f"{steps}: same bits", flush=True)
        if differ and stretch.begin["code"] != code_digest():
            print("  the code is not the one that trained it, which may be why")
    if wrong:
        raise typer.Exit(1)
