"""What is read of the machine, from files and answers that a test puts there."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from nanochat_core.machine import hardware
from nanochat_core.machine.hardware import Machine, Said

SPARK = "NVIDIA GB10, 580.95.05, 12.1, 55.80, 64"


def faked(root: Path, files: dict[str, str], answers: dict[str, Said]) -> Machine:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    def ask(words: Sequence[str]) -> Said:
        return answers.get(words[0], Said(127, ""))

    return Machine(root, ask)


def test_a_gpu_is_read_and_what_it_does_not_tell_is_none(tmp_path: Path) -> None:
    here = faked(
        tmp_path, {}, {"nvidia-smi": Said(0, SPARK + "\nNVIDIA GB10, 580.95.05, 12.1, [N/A], [N/A]")}
    )
    found, why = hardware.gpus(here)
    assert why == "" and found[0] == ("NVIDIA GB10", "580.95.05", "12.1", 55.8, 64.0)
    assert found[1].watts is None and found[1].celsius is None


def test_a_broken_driver_is_told_from_none(tmp_path: Path) -> None:
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert hardware.gpus(faked(tmp_path, {}, {"nvidia-smi": Said(9, words)})) == ([], words)
    assert hardware.gpus(faked(tmp_path, {}, {"nvidia-smi": Said(0, "No devices were found")}))[1]
    assert hardware.gpus(faked(tmp_path, {}, {})) == ([], "")


def test_memory_is_bytes_and_none_where_it_is_not_told(tmp_path: Path) -> None:
    text = "MemTotal:  1000 kB\nMemAvailable:  400 kB\nSwapTotal: 50 kB\nHugePages_Total: 0\n"
    assert hardware.memory(faked(tmp_path, {"proc/meminfo": text}, {})) == (1_024_000, 409_600, 51_200)
    assert hardware.memory(faked(tmp_path / "none", {}, {})) is None


def test_the_warmest_believable_sensor_counts(tmp_path: Path) -> None:
    sensors = {"sys/class/hwmon/hwmon0/temp1_input": "61000", "sys/class/hwmon/hwmon1/temp1_input": "-273000"}
    sensors |= {"sys/class/thermal/thermal_zone0/temp": "45000", "sys/class/thermal/thermal_zone1/temp": "?"}
    assert hardware.warmest(faked(tmp_path, sensors, {})) == 61.0
    assert hardware.warmest(faked(tmp_path / "none", {}, {})) is None


def test_power_is_the_gpus_or_else_a_difference_of_the_cpus_counter(tmp_path: Path) -> None:
    ram = {"proc/meminfo": "MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n"}
    spark = faked(tmp_path / "spark", ram, {"nvidia-smi": Said(0, SPARK)})
    assert hardware.Meter(spark).read() == (1.02, 64.0, 55.8, "GPU")
    counter = "sys/class/powercap/intel-rapl:0/energy_uj"
    box = faked(tmp_path / "box", ram | {counter: "1000000"}, {})
    meter = hardware.Meter(box)
    (tmp_path / "box" / counter).write_text("9000000")
    time.sleep(0.1)
    reading = meter.read()
    assert (
        reading.meter == "CPU package" and 0 < (reading.watts or 0) <= 80
    )  # 8 J in a tenth of a second or more
    (tmp_path / "box" / counter).write_text("5")
    assert meter.read().watts is None  # it wrapped around


def test_the_log_of_a_stage_has_its_beginning_and_stops_with_it(tmp_path: Path) -> None:
    ram = {"proc/meminfo": "MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n"}
    with hardware.logged(tmp_path / "machine.jsonl", faked(tmp_path, ram, {})):
        time.sleep(0.05)
    (row,) = map(json.loads, (tmp_path / "machine.jsonl").read_text().splitlines())
    assert row["memory_gb"] == 1.02 and row["time"] > 1e9 and "watts" not in row
