"""The manifests: rendered by kustomize, judged by the schemas of Kubernetes and of the operator."""

import copy
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "docker" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
TARGETS = (*(f"overlays/{name}" for name in OVERLAYS), "compress")
COMMAND = next(
    (
        command
        for command in (("kustomize", "build"), ("kubectl", "kustomize"))
        if shutil.which(command[0])
    ),
    None,
)
Manifest = dict[str, Any]

pytestmark = pytest.mark.skipif(COMMAND is None, reason="there is no kustomize and no kubectl")
validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")


@cache
def _rendered(target: str) -> str:
    assert COMMAND
    done = subprocess.run([*COMMAND, KUBERNETES / target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(target: str) -> list[Manifest]:
    return list(yaml.safe_load_all(_rendered(target)))


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Every pod template."""
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "Job"):
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield from (group["leaderTemplate"], group["workerTemplate"])


def validate(manifest: Manifest) -> None:
    """Raise unless it fits its schema, without a field too many.

    Of a LeaderWorkerSet, whose schema no package carries, the pods are judged.
    """
    if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
        operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
        model = getattr(operator, manifest["kind"])
        parsed = model.model_validate(manifest).model_dump(
            by_alias=True, exclude_unset=True, mode="json"
        )
        assert without_versions(parsed) == without_versions(manifest)
    elif manifest["kind"] == "LeaderWorkerSet":
        for template in pods([manifest]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
            validate({**pod, "spec": template["spec"]})
    else:
        version = validator.latest_version()
        validator.validate(manifest, version, strict=True)


def without_versions(manifest: Manifest) -> Manifest:
    return {name: value for name, value in manifest.items() if name not in ("apiVersion", "kind")}


@pytest.mark.parametrize("target", TARGETS)
def test_every_manifest_fits_its_schema(target: str) -> None:
    manifests = rendered(target)
    assert manifests
    for manifest in manifests:
        validate(manifest)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "livenessProbes")),
        ("ServiceMonitor", ("spec", "endpoints", 0, "pathh")),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "exprr")),
        ("NetworkPolicy", ("spec", "ingres")),
    ],
)
def test_a_misspelt_field_does_not_fit(kind: str, path: tuple[str | int, ...]) -> None:
    wrong = copy.deepcopy(of_kind(rendered("overlays/cpu"), kind))
    validate(wrong)
    place: Any = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = {}
    with pytest.raises((validator.ValidationError, AssertionError)):
        validate(wrong)


@pytest.mark.parametrize("target", TARGETS)
def test_every_pod_is_confined(target: str) -> None:
    found = list(pods(rendered(target)))
    assert found
    for template in found:
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"]["memory"]
            assert container["resources"]["limits"]["memory"]
            assert not container["image"].endswith(":latest")
            assert volumes >= {mount["name"] for mount in container["volumeMounts"]}
        mounts = [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]]
        assert {"/cache", "/models", "/tmp"} <= set(mounts)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_is_probed_selected_and_scraped(name: str) -> None:
    manifests = rendered(f"overlays/{name}")
    server = next(pods(manifests))
    (container,) = server["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    grace = server["spec"]["terminationGracePeriodSeconds"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace > pause + 30  # the server's own --shutdown-timeout
    labels = server["metadata"]["labels"].items()
    service = of_kind(manifests, "Service")
    assert service["spec"]["selector"].items() <= labels
    budget = of_kind(manifests, "PodDisruptionBudget")["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels
    monitor = of_kind(manifests, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "svdserve"
    assert monitor["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]
    policy = of_kind(manifests, "NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    claim = of_kind(manifests, "PersistentVolumeClaim")["metadata"]["name"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in server["spec"]["volumes"][:1]]
    assert claims == [claim]


def test_gpus_of_the_overlays() -> None:
    def gpus(name: str) -> list[int]:
        containers = [t["spec"]["containers"][0] for t in pods(rendered(f"overlays/{name}"))]
        return [c["resources"]["limits"].get("nvidia.com/gpu", 0) for c in containers]

    assert gpus("cpu") == [0]
    assert gpus("gpu") == [1]
    assert gpus("tensor-parallel") == [4]
    assert gpus("multi-node") == [8, 8]
    (container,) = next(pods(rendered("overlays/tensor-parallel")))["spec"]["containers"]
    assert container["args"][-1] == "--tensor-parallel-size=4"
    assert "--enforce-eager" not in container["args"]


def test_the_operators_rules_are_those_of_prometheus() -> None:
    generator = KUBERNETES / "monitoring" / "generate.py"
    written = (KUBERNETES / "monitoring" / "prometheusrule.yaml").read_text()
    assert runpy.run_path(str(generator))["as_yaml"]() == written
