"""What torch can do here, tried in a process of its own: `python -m nanochat_core.machine.trial [--compile]`.

A broken driver can end the process that touches it, so nobody touches it in theirs. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from nanochat_core.machine.installed import module

TRIAL_SECONDS = 300.0  # a first compile on a cold cache is a minute or two
SIZE, CPU_SIZE = 8192, 1024  # of the matrices
WARM = 3


def try_out(
    *, device: str, compile: bool, burn: float, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run the trial; what it found, or `error` with its last words."""
    words = module("nanochat_core.machine.trial", "--device", device, "--burn", str(burn))
    words += ["--compile"] if compile else []
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRIAL_SECONDS,
            env=os.environ | dict(env or {}),
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {TRIAL_SECONDS:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    words = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return {"error": words[-1] if words else f"it ended with code {done.returncode}"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--burn", type=float, default=0.0)
    asked = parser.parse_args()
    import torch

    from nanochat_core.artifacts.stage import Runtime
    from nanochat_core.machine.hardware import peak_flops
    from nanochat_core.machine.ranks import pick_dtype

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    there = asked.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if there else "cpu")
    found["device"] = device.type
    if there:
        name = torch.cuda.get_device_name()
        found |= {"name": name, "capability": ".".join(map(str, torch.cuda.get_device_capability()))}
        found |= {"count": torch.cuda.device_count(), "arches": torch.cuda.get_arch_list()}
        found["peak"] = peak_flops(name)
        found["integrated"] = bool(torch.cuda.get_device_properties(0).is_integrated)
    dtype = pick_dtype(Runtime(), device)
    found["dtype"] = str(dtype).removeprefix("torch.")
    if asked.burn:
        found["flops"] = burn(torch, device, dtype, asked.burn)
    if asked.compile:
        try:
            x = torch.arange(1024.0, device=device)
            twice = torch.compile(lambda x: (2 * x).sum())
            found["compile"] = "ok" if float(twice(x)) == 1024 * 1023 else "it computed a wrong sum"
        except Exception as error:  # whatever the compilers below have to say is the finding
            lines = [line for line in str(error).splitlines() if line.strip()]
            told = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
            found["compile"] = (told or lines or [type(error).__name__])[0].strip()
    print(json.dumps(found))


def burn(torch: Any, device: Any, dtype: Any, seconds: float) -> float:
    """FLOP/s of large matrix products, sustained: the last two thirds count, when clocks have settled."""
    n = SIZE if device.type == "cuda" else CPU_SIZE
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(WARM):
        a @ b
    wait()
    begin = time.monotonic()
    counted, since = 0, begin
    while (now := time.monotonic()) - begin < seconds:
        if since == begin and now - begin > seconds / 3:
            counted, since = 0, now
        for _ in range(4):
            a @ b
        wait()
        counted += 4
    return float(2 * n**3 * counted / (time.monotonic() - since))


if __name__ == "__main__":
    main()
