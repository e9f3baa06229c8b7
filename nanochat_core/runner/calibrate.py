"""How fast this machine trains the model of a plan: a few timed steps of the real one, kept per machine.

`python -m nanochat_core.runner.calibrate JSON` is the child that does it; its last line is JSON. Where the
whole model would take minutes (a d20 on a CPU), two slices of it, 4 and 8 layers at full width, are timed
instead, and the rest follows by the line through them. That is said wherever it is shown.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Runtime, canonical
from nanochat_core.machine import guard, hardware
from nanochat_core.machine.installed import module
from nanochat_core.model.flops import flops_per_token, num_params
from nanochat_core.model.shape import GPTConfig
from nanochat_core.report.published import EXPECTED
from nanochat_core.runner.plan import Plan
from nanochat_core.stages import pretrain
from nanochat_core.train.config import base_shape

SLICES = (4, 8)  # layers; the pattern of windows and value embeddings repeats every four
WHOLE_SECONDS, MOST_SECONDS = 40.0, 600.0  # a whole model if it takes less, nothing if slices take more
CHILD_SECONDS = 1800.0
BYTES_PER_PARAM = 20  # weights, gradients and two moments in fp32, and a copy on the way
DECODE_ROWS = 64
# As long as nothing was measured: a 2.5 GHz server core with a small model in fp32, per second; 40% of
# what a GB10 can do in bf16, and half of what its memory gives.
CPU_FLOPS, CPU_BYTES = 15e9, 2e9
CUDA_FLOPS, CUDA_BYTES = 50e12, 100e9


class Point(NamedTuple):
    """One device batch, timed."""

    rows: int
    tokens_per_s: float
    memory_gb: float | None


class Calibration(NamedTuple):
    """What was measured, of one process."""

    points: list[Point]
    update_seconds: float  # of the optimizer, once a step
    forward_tokens_per_s: float
    decode_tokens_per_s: float  # of 64 answers at once
    how: str

    def best(self, most: int = 0) -> Point:
        """The fastest device batch of at most so many rows."""
        fitting = [point for point in self.points if not most or point.rows <= most] or self.points[:1]
        return max(fitting, key=lambda point: point.tokens_per_s)


def has_cuda(runtime: Runtime) -> bool:
    return runtime.device != "cpu" and Path("/dev/nvidiactl").exists()


def assumed_rate(plan: Plan) -> tuple[float, str]:
    """FLOP/s of one process as long as nothing was measured: for a profile that is named after a machine,
    what others measured on it."""
    if plan.runtime.device == "cuda" or has_cuda(plan.runtime):
        known = EXPECTED.get(Path(plan.profile).stem)
        if known is not None:
            return sum(known.rates) / 2, f"an assumed GPU, as in {known.reason}"
        return CUDA_FLOPS, "an assumed GPU"
    return CPU_FLOPS * (os.cpu_count() or 1), "an assumed CPU"


def assumed(plan: Plan, rate: float) -> Calibration | None:
    """What a calibration might find, from a rate in FLOP/s of all processes: training reads three times, and
    decoding reads every weight once for all answers at a time."""
    shape = shape_of(plan)
    if shape is None:
        return None
    train = rate / plan.runtime.processes / flops_per_token(shape)
    counts = num_params(shape)
    memory = CPU_BYTES
    if plan.runtime.device == "cuda" or has_cuda(
        plan.runtime
    ):  # a faster GPU has faster memory, about so much
        memory = CUDA_BYTES * assumed_rate(plan)[0] / CUDA_FLOPS
    decode = DECODE_ROWS * memory / (4 * (counts["matrices"] + counts["lm_head"]))
    return Calibration([Point(1, train, None)], 0.0, 3 * train, min(decode, 3 * train), "assumed")


def shape_of(plan: Plan) -> GPTConfig | None:
    """The plan's model, if it is one of ours."""
    if plan.base is None or not isinstance(plan.jobs[plan.base].config, pretrain.Config):
        return None
    return base_shape(plan.planned(plan.base))


def path_of(plan: Plan, shape: GPTConfig) -> Path:
    """Where this model's calibration on this machine is kept: another model, torch or machine is another."""
    from importlib.metadata import version

    here = hardware.describe()
    identity = {
        "shape": dataclasses.asdict(shape),
        "runtime": [plan.runtime.device, plan.runtime.precision, plan.runtime.compile, plan.runtime.threads],
        "machine": [here["gpu"], here["cpu"], here["memory"]],
        "torch": version("torch"),
        "rows": device_batches(plan),
    }
    text = json.dumps(canonical(identity), sort_keys=True)
    return plan.runtime.base_dir / "calibration" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def device_batches(plan: Plan) -> list[int]:
    """The profile's own and two smaller ones. Never a larger one: a Spark that runs out of memory stands
    still."""
    shape = shape_of(plan)
    assert shape is not None and plan.base is not None
    whole = max(1, round(plan.facts(plan.base)["batch"]) // shape.sequence_len // plan.runtime.processes)
    most = min(whole, plan.runtime.device_batch.get(plan.base, 32))
    return sorted({max(1, most // 4), max(1, most // 2), most})


def kept(plan: Plan) -> Calibration | None:
    """What an earlier calibration found."""
    shape = shape_of(plan)
    if shape is None:
        return None
    try:
        return _read(json.loads(path_of(plan, shape).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(record: Mapping[str, Any]) -> Calibration:
    return Calibration(**dict(record) | {"points": [Point(**point) for point in record["points"]]})


def cost(plan: Plan) -> tuple[float, tuple[int, ...], list[int]]:
    """Seconds of a calibration at the assumed rate, the layers to time and the device batches."""
    shape, rows = shape_of(plan), device_batches(plan)
    if shape is None:
        raise ValueError(f"profile {plan.profile} has no model of ours to calibrate")
    rate = assumed_rate(plan)[0]

    def seconds(layers: int, rows: list[int]) -> float:
        part = dataclasses.replace(shape, n_layer=layers)
        update = 2.5 * num_params(part)["matrices"] * 30  # Muon's iterations, about
        return (3 * sum(rows) * part.sequence_len * flops_per_token(part) + 3 * update) / rate

    if has_cuda(plan.runtime) or seconds(shape.n_layer, rows) <= WHOLE_SECONDS:
        return seconds(shape.n_layer, rows), (shape.n_layer,), rows
    if shape.n_layer <= SLICES[-1]:
        return seconds(shape.n_layer, rows[:1]), (shape.n_layer,), rows[:1]
    return sum(seconds(layers, [1]) for layers in SLICES), SLICES, [1]


def calibrate(plan: Plan, say: Callable[[str], object]) -> Calibration:
    """Time the plan's model here, and keep what was found; refused where it cannot be done."""
    shape = shape_of(plan)
    if shape is None:
        raise ValueError(f"profile {plan.profile} has no model of ours to calibrate")
    if plan.runtime.device == "cuda" and not has_cuda(plan.runtime):
        raise ValueError(
            f"profile {plan.profile} is for a GPU, and this machine has none; "
            "calibrate there, or say --set runtime.device=cpu to know what this CPU would take"
        )
    seconds, layers, rows = cost(plan)
    if seconds > MOST_SECONDS:
        raise ValueError(
            f"timing even a slice of this model would take about {seconds / 60:.0f} minutes here; "
            "calibrate on the machine that is to train it, or choose a smaller pretrain.depth"
        )
    largest = dataclasses.replace(shape, n_layer=layers[-1])
    least, found = BYTES_PER_PARAM * sum(num_params(largest).values()), hardware.memory()
    if found is not None and found.available < least:
        raise ValueError(
            f"timing this model wants {least / 1e9:.0f} GB of memory, and {found.available / 1e9:.0f} GB are "
            "free; end other programs, or choose a smaller pretrain.depth"
        )
    with store.locked(plan.runtime.base_dir / "locks" / "device.lock", wait=False) as free:
        if not free:
            raise ValueError(
                "a stage is at work on this device; calibrate when it has ended, or see: nanochat status"
            )
        part = (
            f" (slices of {' and '.join(map(str, layers))} of its {shape.n_layer} layers)"
            if len(layers) > 1
            else ""
        )
        say(f"calibrating: a few steps of the model{part}, once on this machine ...")
        asked = {
            "shape": dataclasses.asdict(shape),
            "runtime": plan.runtime.model_dump(mode="json")
            | {"base_dir": str(plan.runtime.base_dir), "nproc": 1},
            "layers": layers,
            "rows": rows,
        }
        result = _child(json.dumps(asked))
    path = path_of(plan, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_json(path, result)
    return _read(result)


def _child(asked: str) -> dict[str, Any]:
    """The child's findings; it is ended if memory runs short, as a stage would be."""
    process = subprocess.Popen(
        module("nanochat_core.runner.calibrate", asked),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")},
    )
    try:
        deadline = time.monotonic() + CHILD_SECONDS
        while True:
            try:
                out, _ = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if guard.look():
                    guard.relieve(process, 0)
                    raise ValueError(
                        "memory was running out while the model was timed; set a smaller device batch"
                    ) from None
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"the calibration did not end in {CHILD_SECONDS / 60:.0f} minutes"
                    ) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    lines = out.decode(errors="replace").strip().splitlines() or ["no message"]
    if process.returncode != 0:
        raise ValueError(f"the model could not be timed: {lines[-1].removeprefix('error: ')}")
    return dict(json.loads(lines[-1]))


# The child's side.


def main(asked: Mapping[str, Any]) -> dict[str, Any]:
    from nanochat_core.machine.ranks import ranks

    shape, runtime = GPTConfig(**asked["shape"]), Runtime.model_validate(asked["runtime"])
    with ranks(runtime) as world:
        timed = [
            _time(dataclasses.replace(shape, n_layer=layers), runtime, world, asked["rows"])
            for layers in asked["layers"]
        ]
    layers = asked["layers"]
    if len(timed) == 1:
        found, how = timed[0], f"{layers[0]} layers, measured"
    else:
        (low, high), (a, b) = layers, timed
        odd = next((key for key in a if b[key] < a[key]), None)
        if odd is not None:  # the line through them would end below zero
            raise ValueError(
                f"{high} layers took less time than {low} ({odd}: {b[odd]:.3g} s, not {a[odd]:.3g}), so "
                "something else was at work; try again when this machine is quiet"
            )
        reach = (shape.n_layer - low) / (high - low)
        found = {key: a[key] + reach * (b[key] - a[key]) for key in a}
        how = f"reckoned from {low} and {high} of {shape.n_layer} layers, measured"
    T = shape.sequence_len
    points = [
        {
            "rows": rows,
            "tokens_per_s": rows * T / found[f"train {rows}"],
            "memory_gb": found.get(f"memory {rows}"),
        }
        for rows in asked["rows"]
    ]
    return {
        "points": points,
        "update_seconds": found["update"],
        "forward_tokens_per_s": asked["rows"][-1] * T / found["forward"],
        "decode_tokens_per_s": DECODE_ROWS / found["decode"],
        "how": how,
    }


def _time(shape: GPTConfig, runtime: Runtime, world: Any, batches: list[int]) -> dict[str, float]:
    """Seconds of a forward and backward pass at each device batch, of an update, of a decoding step."""
    import torch

    from nanochat_core.artifacts.stage import Job
    from nanochat_core.data.batch import Batch
    from nanochat_core.infer.decoder import Decoder
    from nanochat_core.model.gpt import GPT
    from nanochat_core.train.config import Training
    from nanochat_core.train.loop import _Runner
    from nanochat_core.train.setup import new_state

    cuda = world.device.type == "cuda"

    def seconds(work: Callable[[], object], times: int = 2) -> float:
        work()  # compiles, fills caches
        if cuda:
            torch.cuda.synchronize()
        taken = []
        for _ in range(times):
            begin = time.monotonic()
            work()
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.monotonic() - begin)
        return min(taken)  # what others did to this machine meanwhile is left out as far as can be

    state = new_state(GPT(shape).init_weights(0), Training().rates(2**19), world)
    runtime = runtime.model_copy(update={"device_batch": {}})
    runner = _Runner(Job("", Training(), {}, Path(), runtime, ""), world, state, runtime.compile)
    ids = torch.randint(
        shape.vocab_size, (batches[-1], shape.sequence_len + 1), generator=torch.Generator().manual_seed(0)
    )
    found = {}
    for rows in batches:
        inputs, targets = ids[:rows, :-1].contiguous(), ids[:rows, 1:].contiguous()
        batch = Batch(inputs, targets, torch.ones(inputs.shape), inputs.numel(), dict)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found[f"train {rows}"] = seconds(lambda batch=batch: runner.backward(batch, batch.count))  # type: ignore[misc]
        if cuda:
            found[f"memory {rows}"] = torch.cuda.max_memory_allocated() / 1e9

    def update() -> None:
        state.optimizer.reduce()
        state.optimizer.update(lr=0.01, momentum=0.9, weight_decay=0.0, grad_scale=1.0)

    found["update"] = seconds(update)
    state.optimizer.zero_grad()
    model = state.model.eval()
    with torch.no_grad():
        inputs = ids[:, :-1].to(world.device)
        found["forward"] = seconds(
            lambda: model(inputs, last=torch.zeros(len(inputs), dtype=torch.long, device=world.device)), 1
        )
    decoder = Decoder(model, DECODE_ROWS)
    decoder.reserve(1)
    first = [0] * DECODE_ROWS  # token and position of every row
    found["decode"] = seconds(lambda: decoder.read(first, [-1] * DECODE_ROWS, first, [], None), 4)
    return found


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except ValueError as problem:
        print(f"error: {problem}")
        raise SystemExit(1) from None
