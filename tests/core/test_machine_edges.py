"""A machine whose tools misbehave: what the doctor, the memory guard, a run and its server make of that."""

import contextlib
import dataclasses
import os
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_doctor import SPARK, Box
from toys import Toy

from flows import server
from nanochat_core.artifacts import store
from nanochat_core.machine import guard, hardware, probes, proxy
from nanochat_core.machine.hardware import Gpu, Machine, Said, gpus, unified
from nanochat_core.runner import doctor, launch
from nanochat_core.runner import plan as plans

GB10 = Gpu("NVIDIA GB10", "580.95.05", "12.1", 55.8, 64.0)
H100 = "NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 95.1, 33"
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
WARNING = "WARNING: infoROM is corrupted at gpu 0000:01:00.0"
INFORMATION = "proc/driver/nvidia/gpus/000f:01:00.0/information"
DMI = "sys/class/dmi/id/product_name"

# What nvidia-smi says, what else the machine says of itself; then: GPUs seen, whether memory is unified.
EDGES: list[tuple[Said, dict[str, str], int, bool | None]] = [
    (Said(0, SPARK), {}, 1, True),
    (Said(0, f"{SPARK}\n{WARNING}"), {}, 1, True),
    (Said(0, f"{WARNING}\n{SPARK}"), {}, 1, True),
    (Said(14, f"{SPARK}\n{WARNING}"), {}, 1, True),
    (Said(0, SPARK, WARNING), {}, 1, True),
    (Said(0, f"one, two, three, four, five\n\n{SPARK}\nName, Driver, a, b"), {}, 1, True),
    (Said(0, f"{SPARK}\nUnable to determine the device handle for GPU1: GPU is lost."), {}, 1, True),
    (Said(0, f"{H100}\n{H100}"), {}, 2, False),
    (Said(0, H100, WARNING), {}, 1, False),
    (Said(18, MISMATCH), {}, 0, None),
    (Said(18, MISMATCH), {INFORMATION: "Model: \t\t NVIDIA GB10\nIRQ: 1"}, 0, True),
    (Said(18, MISMATCH), {INFORMATION: "Model: \t\t NVIDIA H100 80GB HBM3"}, 0, False),
    (Said(18, MISMATCH), {INFORMATION: "Model: \t\t Unknown"}, 0, None),
    (Said(18, MISMATCH), {DMI: "NVIDIA_DGX_Spark"}, 0, True),
    (Said(124, "", "nvidia-smi did not answer in 20 s"), {DMI: "ASUS Ascent GX10"}, 0, True),
    (Said(0, ""), {}, 0, None),
    (
        Said(0, "No devices were found"),
        {"proc/device-tree/compatible": "nvidia,p3834\0nvidia,tegra264"},
        0,
        True,
    ),
    (Said(127, ""), {"proc/driver/nvidia/version": "NVRM version: 580.95.05"}, 0, None),
    (Said(127, ""), {DMI: "NVIDIA_DGX_Spark"}, 0, True),
    (Said(127, ""), {}, 0, False),
]


@pytest.fixture
def spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> plans.Plan:
    from nanochat_core.infer import sandbox

    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    monkeypatch.setattr(sandbox, "available", lambda: "bubblewrap")
    return plans.load("dgx-spark", base_dir=tmp_path / "base")


def test_no_edge_of_nvidia_smi_hides_a_gpu_or_loosens_the_limits(
    tmp_path: Path, spark: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, (said, files, count, shared) in enumerate(EDGES):
        box = Box(tmp_path / str(i))
        box.answers["nvidia-smi"] = said
        for name, text in files.items():
            box.file(name, text)
        machine = Machine(box.root, box.ask)
        found, why = gpus(machine)
        assert (len(found), unified(machine)) == (count, shared), said
        if SPARK in said.out:
            assert found == [GB10]
        monkeypatch.setattr(guard, "unified", lambda machine=machine: unified(machine))
        bounds = guard.limits.__wrapped__()
        assert bounds == (guard.OWN if shared is False else guard.SHARED), said
        lines = box.examine(spark)
        assert (lines["GPU"].state == "ok") == (count > 0), said
        assert WARNING not in said.out + said.err or WARNING in lines["GPU"].found
        if count == 0 and said.code != 127:
            assert why and why in lines["GPU"].found
        box.memory(60, swap=4)
        state = box.examine(spark)["swap"].state
        assert state == ("ok" if shared is False else "warn"), said  # swap freezes a box of unified memory


def test_output_and_complaints_of_a_command_are_kept_apart(tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{WARNING}' >&2\necho '{SPARK}'\n")
    script.chmod(0o755)
    said = hardware.ask([str(script)])
    assert said == Said(0, SPARK, WARNING)
    assert gpus(Machine(tmp_path, lambda words: hardware.ask([str(script)]))) == ([GB10], WARNING)


class Refusal(Exception):
    """An error of NVML."""


def library(**changes: Any) -> types.SimpleNamespace:
    """NVML on a Spark that does not tell its power."""

    def refuse(*_: Any) -> float:
        raise Refusal("Not Supported")

    known = types.SimpleNamespace(
        NVMLError=Refusal,
        NVMLError_LibraryNotFound=type("Missing", (Refusal,), {}),
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.95.05",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda gpu: "NVIDIA GB10",
        nvmlDeviceGetCudaComputeCapability=lambda gpu: (12, 1),
        nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetTemperature=lambda gpu, sensor: 64,
    )
    known.__dict__.update(changes)
    return known


def test_nvml_is_asked_first_and_printed_text_only_where_it_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(tmp_path, lambda words: Said(0, H100), hardware.nvml)

    def fail(words: str, kind: type[Refusal] = Refusal) -> Any:
        def error(*_: Any) -> None:
            raise kind(words)

        return error

    monkeypatch.setattr(hardware, "pynvml", library())
    assert gpus(here) == ([GB10._replace(watts=None)], "")
    monkeypatch.setattr(hardware, "pynvml", library(nvmlDeviceGetPowerUsage=lambda gpu: 55_800))
    assert gpus(here) == ([GB10], "")
    second_lost = {"nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetName": lambda gpu: "NVIDIA GB10"}
    second_lost["nvmlDeviceGetHandleByIndex"] = lambda i: i if i == 0 else fail("GPU is lost")()
    monkeypatch.setattr(hardware, "pynvml", library(**second_lost))
    found, why = gpus(here)
    assert len(found) == 1 and why == "NVML: GPU 1: GPU is lost"
    monkeypatch.setattr(hardware, "pynvml", library(nvmlInit=fail("Driver/library version mismatch")))
    assert gpus(here)[0][0].name == "NVIDIA H100 80GB HBM3"
    gone = dataclasses.replace(here, ask=lambda words: Said(127, ""))
    assert gpus(gone) == ([], "NVML: Driver/library version mismatch") and unified(gone) is None
    missing = library()
    missing.nvmlInit = fail("no libnvidia-ml.so.1", missing.NVMLError_LibraryNotFound)
    monkeypatch.setattr(hardware, "pynvml", missing)
    assert gpus(gone) == ([], "") and unified(gone) is False


def test_torch_knows_the_memory_of_a_gpu_whose_name_nobody_knows(
    tmp_path: Path, spark: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path / "root")
    box.answers["nvidia-smi"] = Said(0, SPARK.replace("GB10", "N2"))
    box.tried["integrated"] = False
    assert doctor.examine(spark, plans.explain(spark), box.edges()).env == {}
    box.tried["integrated"] = True
    found = doctor.examine(spark, plans.explain(spark), box.edges())
    assert found.env == {guard.INTEGRATED: "1"}
    monkeypatch.setenv(guard.INTEGRATED, "1")
    monkeypatch.setattr(guard, "unified", lambda: False)
    assert guard.limits.__wrapped__() == guard.SHARED


def test_upgrades_and_a_reboot_that_may_end_a_run_are_told(tmp_path: Path, spark: plans.Plan) -> None:
    box = Box(tmp_path / "root")
    assert not {"reboot", "updates"} & set(box.examine(spark))
    box.file("run/reboot-required", "*** System restart required ***\n")
    box.file("run/reboot-required.pkgs", "linux-image-nvidia\nlibc6\n")
    box.file("etc/apt/apt.conf.d/20auto-upgrades", 'APT::Periodic::Unattended-Upgrade "1";\n')
    found = box.examine(spark)
    assert found["reboot"][1:3] == ("warn", "pending, for linux-image-nvidia libc6")
    assert found["updates"].state == "warn" and "reboot" not in found["updates"].found
    assert found["updates"].remedy.endswith(
        "systemctl disable --now unattended-upgrades apt-daily-upgrade.timer"
    )
    box.file("etc/apt/apt.conf.d/50mine", '// x\nUnattended-Upgrade::Automatic-Reboot "true";\n')
    assert "reboot this machine" in box.examine(spark)["updates"].found
    box.answers["systemctl"] = Said(1, "disabled")
    assert box.examine(spark)["updates"].state == "ok"
    box.answers["systemctl"] = Said(0, "enabled")
    box.file("etc/apt/apt.conf.d/99off", 'APT::Periodic::Unattended-Upgrade "0";\n')
    assert box.examine(spark)["updates"].state == "ok"


def test_compiled_kernels_are_kept_under_the_base_directory_or_where_the_user_says(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toy.plan()
    path = made.jobs["shards"].path / "job.json"
    path.parent.mkdir(parents=True)
    store.write_json(path, launch.describe(made, "shards", None))
    seen: dict[str, str] = {}
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)
    monkeypatch.setattr(launch, "execute", lambda job: seen.update(os.environ))
    monkeypatch.setattr(os, "environ", {"TRITON_CACHE_DIR": "/mine"})
    launch.main([str(path)])
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == str(toy.base_dir / "kernels" / "inductor")
    assert seen["TRITON_CACHE_DIR"] == "/mine"


# Proxies.

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@contextlib.contextmanager
def answering(code: int, body: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that gives one answer to everything, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_POST = do_CONNECT = do_GET

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", asked
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    "names", [("http_proxy",), ("HTTP_PROXY",), ("all_proxy",), ("http_proxy", "no_proxy")]
)
@pytest.mark.usefixtures("no_proxies")
def test_a_server_on_this_machine_is_asked_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    with answering(200, b"true") as (url, asked), answering(403, b"blocked") as (between, stopped):
        for name in names:
            monkeypatch.setenv(name, "intranet.example" if name == "no_proxy" else between)
        assert server.healthy(url) and server.ask(url, "anything") is True
        assert not server.healthy("http://127.0.0.1:9") and not server.healthy("http://localhost:9")
        assert probes.reach("http://127.0.0.1:9").error
        assert asked == ["/health", "/anything"] and stopped == []
        assert probes.reach("http://elsewhere.example/").error == "" and len(stopped) == 1  # that goes by it
        for name, value in proxy.direct(os.environ).items():
            monkeypatch.setenv(name, value)
        assert httpx.get(f"{url}/as-prefect-asks", timeout=5).json() is True and len(stopped) == 1
        assert launch.environment()["NO_PROXY"] == os.environ["NO_PROXY"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a.example"}, "a.example,127.0.0.1,localhost,::1"),
        ({"no_proxy": "localhost, .b.example", "NO_PROXY": "a"}, "localhost,.b.example,a,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_what_the_user_excepts_from_the_proxy_stays_so(before: dict[str, str], after: str) -> None:
    found = proxy.direct(before)
    assert found == {"no_proxy": after, "NO_PROXY": after} == proxy.direct(found)


@pytest.mark.usefixtures("no_proxies")
def test_a_socks_proxy_is_told_and_does_not_keep_prefects_client_from_starting(
    tmp_path: Path, spark: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path / "root")
    assert "proxy" not in box.examine(spark, https_proxy="http://proxy:3128", ALL_PROXY="socks5://proxy:1080")
    line = box.examine(spark, ALL_PROXY="socks5h://proxy:1080")["proxy"]
    assert line.state == "warn" and "ALL_PROXY names a SOCKS proxy" in line.found
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    for name, value in proxy.direct(os.environ).items():
        monkeypatch.setenv(name, value)
    with answering(200, b"true") as (url, _):
        assert server.healthy(url)
        with httpx.Client() as client:
            assert client.get(url).json() is True
