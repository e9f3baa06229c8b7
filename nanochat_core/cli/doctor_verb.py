"""`nanochat doctor`: can this machine carry a profile to its end?"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_core.cli.options import (
    HOME,
    AsJson,
    BaseDir,
    Sets,
    Stages,
    command,
    load_plan,
    resolved,
    table,
    with_stages,
)

if TYPE_CHECKING:
    from nanochat_core.runner.doctor import Line


def doctor(
    profile: Annotated[
        str | None, typer.Argument(help="what it should carry; the one that fits, if none is named")
    ] = None,
    set_: Sets = None,
    stage_: Stages = None,
    base_dir: BaseDir = HOME,
    as_json: AsJson = False,
) -> None:
    """Examine this machine: driver, speed, memory, disk, clock, network, services. Half a minute; nothing is
    changed."""
    from nanochat_core.machine.hardware import gpus
    from nanochat_core.runner.doctor import examine
    from nanochat_core.runner.plan import explain

    fits = "dgx-spark" if any("GB10" in gpu.name for gpu in gpus()[0]) else "cpu-demo"
    name = profile or fits
    set_ = with_stages(set_, stage_)
    plan = load_plan(name, set_, None, None, resolved(base_dir))
    found = examine(plan, explain(plan), more=service_lines(resolved(base_dir)))
    states = [line.state for line in found.lines]
    if as_json:
        lines = [line._asdict() for line in found.lines]
        print(
            json.dumps(
                {"profile": name, "fit": "fail" not in states, "lines": lines, "env": found.env}, indent=1
            )
        )
    else:
        print(f"this machine, for {name} ({plan.title}):")
        table(["", "", ""], [[line.state, line.name, line.found] for line in found.lines])
        for line in found.lines:
            if line.state != "ok" and line.remedy:
                print(f"{line.state}: {line.name}: {line.remedy}")
        again = command("doctor", name, set_, None, None, base_dir)
        print(f"next: {again if 'fail' in states else command('run', name, set_, None, None, base_dir)}")
    if "fail" in states:
        raise typer.Exit(1)


def service_lines(base_dir: Path) -> "list[Line]":
    """What `nanochat up` keeps running. A run by hand needs none of it, so nothing here fails."""
    from flows.server import address, healthy
    from nanochat_core.runner.doctor import Line

    url = address(base_dir)
    remedy = "nanochat up, or at boot: nanochat install-services"
    if url is None:
        return [Line("Prefect", "ok", "not up; a run by hand brings its own server")]
    if not healthy(url):
        return [Line("Prefect", "warn", f"the server at {url} does not answer", remedy)]
    lines = [Line("Prefect", "ok", f"the server at {url} answers")]
    workers = alive_workers(url)
    if workers is None:
        lines.append(Line("worker", "warn", "the server does not tell of its workers", remedy))
    elif workers:
        lines.append(Line("worker", "ok", f"{workers} online"))
    else:
        lines.append(Line("worker", "warn", "no worker takes runs from the pool", remedy))
    return lines


def alive_workers(url: str) -> int | None:
    """Workers of our pool that the server has heard of lately; None if it does not say."""
    import base64
    import urllib.error
    import urllib.request

    from flows.services import POOL
    from nanochat_core.machine.proxy import opener

    headers = {"content-type": "application/json"}
    key, password = os.environ.get("PREFECT_API_KEY"), os.environ.get("PREFECT_API_AUTH_STRING")
    if key:
        headers["authorization"] = f"Bearer {key}"
    elif password:
        headers["authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    asked = urllib.request.Request(f"{url}/work_pools/{POOL}/workers/filter", b"{}", headers)
    try:
        with opener(url).open(asked, timeout=10) as answer:
            workers: list[dict[str, str]] = json.load(answer)
        return sum(worker.get("status") == "ONLINE" for worker in workers)
    except urllib.error.HTTPError as refused:
        return 0 if refused.code == 404 else None  # no such pool yet
    except (OSError, ValueError):
        return None
