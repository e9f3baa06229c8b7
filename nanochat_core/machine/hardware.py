"""What this machine is and how it does: read from the kernel's files and a few commands, at one place.

Everything that cannot be read is None or empty, never a guess; who shows it says so.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pynvml

VERSION = re.compile(r"\d+(\.\d+)+")  # of a driver
# GPUs whose memory is the machine's, and machines that have one, as the firmware names them.
UNIFIED = ("GB10", "GH200", "Orin", "Thor")
UNIFIED_MACHINES = (*UNIFIED, "DGX Spark", "DGX_Spark", "GX10", "ZGX Nano", "ThinkStation PGX", "tegra")
FIRMWARE = (
    *(f"sys/class/dmi/id/{name}" for name in ("product_name", "product_family", "board_name")),
    *(f"proc/device-tree/{name}" for name in ("model", "compatible")),
)

ASK_SECONDS = 20.0  # nvidia-smi takes long while the driver wakes up
SOONEST, LATEST = 1.0, 30.0  # seconds between two readings of a stage: dense at first; 57,600 in ten days
EARLY = 20  # a reading each twentieth of the time so far, between those bounds

PEAK_FLOPS = {  # dense bf16, nominal
    "GB10": 125e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}


def peak_flops(gpu: str) -> float | None:
    """FLOP/s of a GPU by its name, dense bf16, nominal; None for one that is not in the table."""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in gpu), None)


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 fast: by AVX512_BF16 or AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Said(NamedTuple):
    """A command's exit code and what it printed; code 127 if there is no such command."""

    code: int
    out: str
    err: str = ""


def ask(words: Sequence[str], seconds: float = ASK_SECONDS) -> Said:
    """Run a command that only tells something."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,  # apart: a warning is no row
            timeout=seconds,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        return Said(127, "")
    except subprocess.TimeoutExpired:
        return Said(124, "", f"{words[0]} did not answer in {seconds:.0f} s")
    except OSError as error:
        return Said(126, "", str(error))
    return Said(done.returncode, done.stdout.strip(), done.stderr.strip())


class Gpu(NamedTuple):
    name: str
    driver: str
    capability: str
    watts: float | None
    celsius: float | None


def nvml() -> tuple[list[Gpu], str]:
    """The GPUs that the driver's own library shows, and what it complains of."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return [], ""
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    found, why = [], ""
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        for i in range(pynvml.nvmlDeviceGetCount()):
            try:
                gpu = pynvml.nvmlDeviceGetHandleByIndex(i)
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
                watts = _told(pynvml.nvmlDeviceGetPowerUsage, gpu)  # in thousandths
                celsius = _told(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU)
                name = pynvml.nvmlDeviceGetName(gpu)
                found.append(Gpu(name, driver, f"{major}.{minor}", watts and watts / 1000, celsius))
            except pynvml.NVMLError as error:
                why = f"NVML: GPU {i}: {error}"
    except pynvml.NVMLError as error:
        why = f"NVML: {error}"
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return found, why


def _told(ask: Callable[..., float], *about: Any) -> float | None:
    """What NVML says; a GPU with unified memory does not tell everything."""
    try:
        return float(ask(*about))
    except pynvml.NVMLError:
        return None


@dataclass(frozen=True)
class Machine:
    """Where the facts are read; tests put a folder of files and their own answers here."""

    root: Path = Path("/")
    ask: Callable[[Sequence[str]], Said] = ask
    nvml: Callable[[], tuple[list[Gpu], str]] = lambda: ([], "")

    def text(self, path: str) -> str:
        """A file of the kernel's, without its last newline; empty if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip("\0\n ")
        except OSError:
            return ""

    def folders(self, path: str) -> list[str]:
        """The folders in a folder, from the root on."""
        return sorted(str(found.relative_to(self.root)) for found in (self.root / path).glob("*/"))


HERE = Machine(nvml=nvml)


def gpus(machine: Machine = HERE) -> tuple[list[Gpu], str]:
    """The GPUs that NVIDIA's driver shows, and what it complains of: none and "" where there is no such
    driver at all. NVML is asked first; nvidia-smi, whose text is for people, where that says nothing."""
    found, why = machine.nvml()
    if found:
        return found, why
    fields = "name,driver_version,compute_cap,power.draw,temperature.gpu"
    said = machine.ask(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    if said.code == 127:
        return [], why
    words = []
    for line in [*said.out.splitlines(), *said.err.splitlines()]:
        row = [cell.strip() for cell in line.rsplit(",", 4)]
        if len(row) == 5 and VERSION.fullmatch(row[1]):  # warnings may stand before or after the rows
            found.append(Gpu(row[0], row[1], row[2], _number(row[3]), _number(row[4])))
        elif line.strip():
            words.append(line.strip())
    if not found and not words:
        words = [why or f"nvidia-smi ended with code {said.code}"]
    return found, words[0] if words else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], and [Not Supported] for what a unified-memory GPU does not tell
        return None


def unified(machine: Machine = HERE) -> bool | None:
    """Whether the GPU's memory is the machine's; None where there is a driver that does not say which GPU it
    drives, and nobody else knows."""
    found, why = gpus(machine)
    names = [gpu.name for gpu in found]
    if not names:
        said = [machine.text(f"{path}/information") for path in machine.folders("proc/driver/nvidia/gpus")]
        names = [
            line.partition(":")[2].strip() for text in said for line in text.splitlines() if "Model" in line
        ]
    firmware = [machine.text(path) for path in FIRMWARE]
    if any(name in text for text in names for name in UNIFIED) or any(
        name in text for text in firmware for name in UNIFIED_MACHINES
    ):
        return True
    known = [name for name in names if name not in ("", "Unknown")]
    driver = bool(why) or bool(names) or bool(machine.text("proc/driver/nvidia/version"))
    return None if driver and not known else False


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int
    swap: int


def memory(machine: Machine = HERE) -> Memory | None:
    """What /proc/meminfo says; on a DGX Spark this is the GPU's memory too."""
    found = {}
    for line in machine.text("proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * 1024
    if "MemTotal" not in found or "MemAvailable" not in found:
        return None
    return Memory(found["MemTotal"], found["MemAvailable"], found.get("SwapTotal", 0))


def cpu(machine: Machine = HERE) -> str:
    """The processor's name, as far as the kernel knows one."""
    for line in machine.text("proc/cpuinfo").splitlines():
        name, _, rest = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return rest.strip()
    return platform.processor() or platform.machine()


def describe(machine: Machine = HERE) -> dict[str, str]:
    """What a report should know of the machine, in words."""
    found, _ = gpus(machine)
    ram = memory(machine)
    release = dict(
        line.split("=", 1) for line in machine.text("etc/os-release").splitlines() if line.count("=") == 1
    )
    name = release.get("PRETTY_NAME", platform.system()).strip('"')
    return {
        "gpu": "; ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in found),
        "cpu": f"{cpu(machine)}, {os.cpu_count()} cores",
        "memory": f"{ram.total / 2**30:.0f} GiB" if ram else "",
        "system": f"{name}, {platform.system()} {platform.release()}",
    }


class Reading(NamedTuple):
    """One look at the machine at work."""

    memory_gb: float | None  # in use, of the whole machine
    celsius: float | None  # of the GPUs' warmest, or else of the warmest sensor
    watts: float | None
    meter: str | None  # what the watts are of: "GPU" or "CPU package"


def joules(machine: Machine = HERE) -> float | None:
    """The CPU packages' energy counters, where they may be read."""
    values = [
        _number((path / "energy_uj").read_text())
        for path in sorted((machine.root / "sys/class/powercap").glob("intel-rapl:?"))
        if os.access(path / "energy_uj", os.R_OK)
    ]
    known = [value for value in values if value is not None]
    return sum(known) / 1e6 if known else None


def warmest(machine: Machine = HERE) -> float | None:
    """Degrees of the warmest sensor that the kernel knows."""
    paths = [
        *(machine.root / "sys/class/hwmon").glob("hwmon*/temp*_input"),
        *(machine.root / "sys/class/thermal").glob("thermal_zone*/temp"),
    ]
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()) / 1000)
    return max((degrees for degrees in found if 0 < degrees < 150), default=None)


class Meter:
    """Readings one after another: power from a counter is a difference."""

    def __init__(self, machine: Machine = HERE) -> None:
        self.machine = machine
        self.with_gpu = bool(gpus(machine)[0])
        self.last = (time.monotonic(), joules(machine))

    def read(self) -> Reading:
        ram = memory(self.machine)
        used = round((ram.total - ram.available) / 1e9, 2) if ram else None
        found = gpus(self.machine)[0] if self.with_gpu else []
        if found:
            watts = [gpu.watts for gpu in found if gpu.watts is not None]
            degrees = [gpu.celsius for gpu in found if gpu.celsius is not None]
            power = round(sum(watts), 1) if watts else None
            return Reading(used, max(degrees, default=None), power, "GPU" if watts else None)
        (before, old), now, counted = self.last, time.monotonic(), joules(self.machine)
        self.last = (now, counted)
        if old is None or counted is None or counted < old or now <= before:  # the counter wraps around
            return Reading(used, warmest(self.machine), None, None)
        return Reading(used, warmest(self.machine), round((counted - old) / (now - before), 1), "CPU package")


@contextlib.contextmanager
def logged(path: Path, machine: Machine = HERE) -> Iterator[None]:
    """Meanwhile, readings of the machine are added to a file: one line of JSON each, with its time."""
    over = threading.Event()

    def keep() -> None:
        meter, begin = Meter(machine), time.monotonic()
        with contextlib.suppress(OSError), path.open("a") as f:  # of a full disk the stage itself will tell
            while True:
                row = {key: value for key, value in meter.read()._asdict().items() if value is not None}
                f.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")
                f.flush()
                if over.wait(min(LATEST, max(SOONEST, (time.monotonic() - begin) / EARLY))):
                    return

    thread = threading.Thread(target=keep, name="machine-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(ASK_SECONDS)
