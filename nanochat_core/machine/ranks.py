"""The processes of a run and the device each computes on. One process is the same code with a world of
one."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from nanochat_core.artifacts.stage import Runtime
from nanochat_core.machine.hardware import cpu_multiplies_bf16

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, its device, and the type it computes in."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, exact for counts: one reduction for all the values."""
        if self.size == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return [float(x) for x in t.tolist()]

    def any(self, flag: bool) -> bool:
        return self.sum(float(flag))[0] > 0

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, one rank's after the other's, on every rank."""
        if self.size == 1:
            return list(items)
        found: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, list(items))
        return [item for part in found for item in part]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def pick_device(runtime: Runtime) -> torch.device:
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "runtime.device is cuda, but torch sees no CUDA device; "
            "set runtime.device=cpu, or look why: nvidia-smi"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_dtype(runtime: Runtime, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it fast (CUDA from sm80; CPUs with AVX512_BF16 or AMX), fp32
    elsewhere."""
    if runtime.precision == "fp8" and device.type == "cuda":
        refuse_without_fp8(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if runtime.precision != "auto":
        return torch.float32 if runtime.precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = cpu_multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def refuse_without_fp8(name: str, capability: tuple[int, int]) -> None:
    """Before any work, instead of from inside the first backward pass."""
    if capability < (8, 9):
        raise ValueError(
            f"{name} (sm{capability[0]}{capability[1]}) cannot multiply in 8 bits, which needs sm89 "
            "or later; set runtime.precision=auto"
        )


@contextlib.contextmanager
def ranks(runtime: Runtime) -> Iterator[World]:
    """Join the other processes, if torchrun started any (NCCL between GPUs, gloo between CPUs)."""
    device = pick_device(runtime)
    dtype = pick_dtype(runtime, device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(runtime.threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if runtime.precision == "fp8" and device.type == "cpu" and rank == 0:
        print("precision fp8 is emulated on a CPU: its rounding at a loss of speed", flush=True)
    try:
        yield World(rank, size, device, dtype)
        # Not after an error: the others would see their connections close and say so, while this one has
        # not yet said why. They close with the process, which ends once it has.
        if size > 1:
            dist.destroy_process_group()
    finally:
        torch.set_flush_denormal(False)  # it would stay on for whatever this process does next
