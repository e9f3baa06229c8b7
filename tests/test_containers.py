"""What the container and Kubernetes files promise: no root, exact versions, 127.0.0.1, secrets from files."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import services
from nanochat_core.artifacts import store
from nanochat_core.runner.plan import profile_names

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
CUDA = yaml.safe_load((ROOT / "docker" / "compose.cuda.yaml").read_text())
OURS = [name for name, service in COMPOSE["services"].items() if "build" in service]
EXACT = re.compile(r"^[a-z0-9./-]+:\d+\.\d+(\.\d+)?-[a-z-]+(@sha256:[0-9a-f]{64})?$")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split()[-1]] = []
        found[list(found)[-1]].append((word, rest))
    return found


def test_base_images_are_named_by_exact_version() -> None:
    for name, steps in stages().items():
        base = steps[0][1].split()[0]
        assert base in stages() or EXACT.match(base), f"{name} is made from {base}"
    assert EXACT.match(COMPOSE["services"]["postgres"]["image"])


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_ends_as_a_user_that_is_not_root(target: str) -> None:
    users = [rest for word, rest in stages()[target] if word == "USER"]
    assert users and users[-1].split(":")[0].isdigit() and users[-1].split(":")[0] != "0"
    assert stages()[target][0][1].split()[0] == "base"
    assert not any(word == "USER" for word, _ in stages()["base"])


def test_what_is_installed_is_what_the_lock_file_says() -> None:
    syncs = [
        command
        for word, rest in instructions()
        if word == "RUN"
        for command in rest.split("&&")
        if "uv sync" in command
    ]
    assert len(syncs) == 3 and all("--frozen" in command and "--no-dev" in command for command in syncs)
    pips = re.findall(r"pip install (.*)", DOCKERFILE.read_text())
    assert pips and all("==" in line for line in pips)
    assert not any(
        "cargo" in rest for word, rest in stages()["base"] if word == "COPY"
    )  # no compiler of Rust


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in stages()["build"]:
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == entry or source.startswith(entry + "/") for entry in kept), source


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_watched_and_started_again(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["restart"] == "unless-stopped"
    assert {"test", "interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["logging"]["options"]["max-size"]
    assert not service.get("privileged") and service.get("network_mode") is None and "user" not in service
    if name in OURS:
        assert service["cap_drop"] == ["ALL"] and service["init"]
        assert (
            service["build"]["target"] in stages() and service["build"]["dockerfile"] == "docker/Dockerfile"
        )


def test_what_is_run_beside_a_service_gets_the_secrets_too() -> None:
    """`docker compose exec` does not go through the image's entrypoint, which is what reads them."""
    (declared,) = [json.loads(rest) for word, rest in stages()["base"] if word == "ENTRYPOINT"]
    found = []
    for folder in ("README.md", "docs/*.md", "docker/*", "deployments/*", "deployments/*/*"):
        for path in ROOT.glob(folder):
            if path.is_file():
                found += re.findall(r"docker compose .*?exec \S+ (\S+)", path.read_text())
    assert len(found) > 1 and set(found) == set(declared)


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not here")
def test_a_worker_is_healthy_while_its_supervisor_holds_the_lock_and_only_then(tmp_path: Path) -> None:
    kind, script = COMPOSE["services"]["worker"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"

    def healthy() -> bool:
        return subprocess.run(["sh", "-c", script.replace("/data", str(tmp_path))]).returncode == 0

    assert not healthy()  # nothing has begun: there is not even the folder
    lock = services.folder(tmp_path) / "supervisor.lock"
    lock.parent.mkdir(parents=True)
    assert not healthy()
    with store.locked(lock):
        assert healthy()
    assert lock.exists() and not healthy()


def test_ranks_on_several_gpus_have_shared_memory_to_meet_in() -> None:
    assert CUDA["services"]["worker"]["shm_size"] == "8gb"


def test_ports_are_published_on_this_machine_only() -> None:
    published = [str(port) for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:4200:4200", "127.0.0.1:8000:8000"]


def test_every_secret_is_a_file_and_no_variable_holds_one() -> None:
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "docker/secrets/" in ignored
    for service in COMPOSE["services"].values():
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        for key, value in service.get("environment", {}).items():
            named = re.search("PASSWORD|TOKEN|AUTH|SECRET|DATABASE", key)
            assert not named or (key.endswith("_FILE") and str(value).startswith("/run/secrets/")), key


def test_names_refer_to_what_is_declared() -> None:
    for service in COMPOSE["services"].values():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"])
        for other, how in service.get("depends_on", {}).items():
            assert other in COMPOSE["services"] and how == {"condition": "service_healthy"}
    assert COMPOSE["networks"]["database"]["internal"]
    assert set(COMPOSE["services"]["postgres"]["networks"]) == {"database"}
    assert set(CUDA["services"]) <= set(COMPOSE["services"])


def test_a_profile_that_is_named_exists() -> None:
    kubernetes = yaml.safe_load((ROOT / "deployments" / "kubernetes" / "prefect.yaml").read_text())
    names = {
        deployment["name"]: deployment["parameters"]["profile"] for deployment in kubernetes["deployments"]
    }
    names |= {name: name for name in profile_names()}
    for path in ("docker/compose.yaml", "deployments/kubernetes/README.md", "docs/scale-out.md"):
        for name in re.findall(r"speedrun/([a-z0-9-]+)", (ROOT / path).read_text()):
            assert names.get(name) in profile_names(), f"{path} names {name}"


def entrypoint(tmp_path: Path, secrets: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    """The entrypoint as it is, but for the folder that its secrets lie in."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name, value in secrets.items():
        (folder / name).write_text(value)
    script = tmp_path / "entrypoint"
    script.write_text((ROOT / "docker" / "entrypoint").read_text().replace("/run/secrets", str(folder)))
    script.chmod(0o755)
    env = {"PATH": os.environ["PATH"]}
    return subprocess.run([str(script), *words], capture_output=True, text=True, env=env)


def test_secrets_reach_the_program_as_the_variables_it_reads(tmp_path: Path) -> None:
    secrets = {"prefect_auth": "admin:s3cret\n", "chat_token": "t0ken\n", "postgres_password": "p@ss/w:rd\n"}
    done = entrypoint(tmp_path, secrets, "env")
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["PREFECT_API_AUTH_STRING"] == found["PREFECT_SERVER_API_AUTH_STRING"] == "admin:s3cret"
    assert found["NANOCHAT_TOKEN"] == "t0ken"
    url = found["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert url == "postgresql+asyncpg://prefect:p%40ss%2Fw%3Ard@postgres:5432/prefect"


def test_without_secrets_nothing_is_set(tmp_path: Path) -> None:
    done = entrypoint(tmp_path, {}, "env")
    assert done.returncode == 0 and "PREFECT" not in done.stdout and "NANOCHAT" not in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_secret_that_cannot_be_read_ends_it_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "chat_token").write_text("x")
    (tmp_path / "secrets" / "chat_token").chmod(0)
    script = tmp_path / "entrypoint"
    text = (ROOT / "docker" / "entrypoint").read_text().replace("/run/secrets", str(tmp_path / "secrets"))
    script.write_text(text)
    done = subprocess.run(["sh", str(script), "true"], capture_output=True, text=True)
    assert done.returncode == 2 and "chat_token cannot be read" in done.stderr


def placeholders(value: Any) -> set[str]:
    return set(re.findall(r"{{ *(\w+) *}}", json.dumps(value)))


def test_the_kubernetes_template_uses_each_variable_it_offers() -> None:
    template = json.loads((ROOT / "deployments" / "kubernetes" / "base-job-template.json").read_text())
    offered = set(template["variables"]["properties"])
    assert placeholders(template["job_configuration"]) == offered
    assert set(template["variables"]["required"]) <= offered
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # the run resumes by its directory, under Prefect's eyes
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claims
