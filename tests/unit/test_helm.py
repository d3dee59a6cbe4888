"""The Helm chart: Helm lints and renders it, its objects meet the schemas of Kubernetes, and its pods have few rights."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from app.settings import Settings

CHART = Path(__file__).parents[2] / "docs" / "helm"
VERSIONS = ("1.27", "1.37")
"""The oldest and the newest version of Kubernetes."""
SECRET = {
    name: f"the value of {name}" for name in ("DPO_DATABASE_URL", "DPO_BROKER_URL", "DPO_STORAGE_URL", "DPO_SECRET_KEY")
}
VALUES: dict[str, dict[str, Any]] = {
    "as it is": {"secret": {"values": SECRET}, "admin": {"key": "the key of the operator"}},
    "objects on a claim": {
        "secret": {"values": {**SECRET, "DPO_STORAGE_URL": ""}},
        "admin": {"key": "the key of the operator"},
        "objects": {"existingClaim": "objects"},
    },
    "everything": {
        "secret": {"existing": "mine"},
        "admin": {"existing": "mine-too"},
        "models": {"existingClaim": "models"},
        "objects": {"existingClaim": "objects"},
        "environment": {"DPO_HUB_MODELS": "org/*", "AWS_REGION": "eu-central-1"},
        "imagePullSecrets": [{"name": "registry"}],
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "tls", "annotations": {"a/b": "c"}},
        "monitoring": {"serviceMonitor": True},
        "autoscaling": {"enabled": True},
        "gpuWorker": {"gpus": 8, "runtimeClassName": "nvidia", "nodeSelector": {"gpu": "h100"}},
    },
}
CUSTOM = {"ServiceMonitor", "ScaledObject"}
"""Kinds of other programs. Kubernetes has no schema for them."""


def objects(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of the chart with these values."""
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="tuning", namespace="ml")
    for name, text in rendered.items():
        if name.endswith(".yaml"):
            yield from filter(None, yaml.safe_load_all(text))


def pods(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The spec of each pod, by its component."""
    templates = [item["spec"]["template"] for item in objects(values) if "template" in item.get("spec", {})]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template["spec"] for template in templates}


@pytest.mark.parametrize("name", VALUES)
def test_helm_finds_nothing_wrong(name: str) -> None:
    result = helm_python.lint(CHART, VALUES[name], strict=True)
    assert result["errors"] == []
    assert [message["error"] for message in result["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VALUES)
def test_every_object_meets_the_schema_of_kubernetes(name: str, version: str) -> None:
    rendered = list(objects(VALUES[name]))
    for item in rendered:
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == "tuning"
    assert {item["kind"] for item in rendered} >= {"Deployment", "Service", "Job", "PodDisruptionBudget"}
    assert ({item["kind"] for item in rendered} >= CUSTOM) == (name == "everything")


@pytest.mark.parametrize("name", VALUES)
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    specs = pods(VALUES[name])
    assert specs.keys() == {"api", "cpu-worker", "gpu-worker", "migrate"}
    for spec in specs.values():
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
        assert spec["terminationGracePeriodSeconds"] > 30
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable - {"/dev/shm", "/objects"} == {"/tmp", "/var/lib/dpo"}
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", VALUES)
def test_all_parts_read_the_stores_and_only_the_api_has_the_operators_key(name: str) -> None:
    secrets = {item["metadata"]["name"]: item for item in objects(VALUES[name]) if item["kind"] == "Secret"}
    if "existing" not in VALUES[name]["secret"]:
        shared, admin, migrate = "tuning-dpo-service", "tuning-dpo-service-admin", "tuning-dpo-service-migrate"
        expected = {key: value for key, value in VALUES[name]["secret"]["values"].items() if value}
        assert secrets[shared]["stringData"] == secrets[migrate]["stringData"] == expected
        assert list(secrets[admin]["stringData"]) == ["DPO_ADMIN_KEY"]
        hooks = [name for name, secret in secrets.items() if "annotations" in secret["metadata"]]
        assert hooks == [migrate]  # what is a hook stays behind when the chart is uninstalled, unless it is deleted
        assert "hook-succeeded" in secrets[migrate]["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    else:
        assert not secrets
        shared, admin, migrate = "mine", "mine-too", "mine"
    fields = {f"DPO_{field.upper()}" for field in Settings.model_fields} | {"DPO_ADMIN_KEY", "DPO_SECRET_KEY"}
    for component, spec in pods(VALUES[name]).items():
        (container,) = spec["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": migrate if component == "migrate" else shared}}]
        given = {variable["name"]: variable for variable in container["env"]}
        assert {variable for variable in given if variable.startswith("DPO_")} <= fields
        assert ("DPO_ADMIN_KEY" in given) == (component == "api")
        if component == "api":
            assert given["DPO_ADMIN_KEY"]["valueFrom"]["secretKeyRef"]["name"] == admin
        assert given["HOME"]["value"] == "/var/lib/dpo"  # the only place, beside /tmp, that can be written
    assert fields >= SECRET.keys()


def test_a_gpu_worker_gets_its_gpus_and_room_for_its_ranks() -> None:
    spec = pods(VALUES["everything"])["gpu-worker"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert spec["runtimeClassName"] == "nvidia" and spec["nodeSelector"] == {"gpu": "h100"}
    (shared,) = (volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shared-memory")
    assert shared["medium"] == "Memory"


def test_autoscaling_sets_the_replicas_of_gpu_workers() -> None:
    deployments = {
        item["metadata"]["name"]: item["spec"] for item in objects(VALUES["everything"]) if item["kind"] == "Deployment"
    }
    (scaled,) = (item for item in objects(VALUES["everything"]) if item["kind"] == "ScaledObject")
    target = scaled["spec"]["scaleTargetRef"]["name"]
    assert "replicas" not in deployments[target]
    (trigger,) = scaled["spec"]["triggers"]
    assert set(re.findall(r'status="(\w+)"', trigger["metadata"]["query"])) == {"queued", "running"}


@pytest.mark.parametrize("missing", SECRET)
def test_a_variable_that_is_missing_is_named(missing: str) -> None:
    given = {name: value for name, value in SECRET.items() if name != missing}
    values = VALUES["as it is"] | {"secret": {"values": given}}
    with pytest.raises(helm_python.HelmError, match=missing):
        list(objects(values))


def test_a_number_of_gpus_below_one_is_refused() -> None:
    with pytest.raises(helm_python.HelmError, match="gpus"):
        list(objects(VALUES["as it is"] | {"gpuWorker": {"gpus": 0}}))


def test_the_worker_of_a_ray_cluster_has_no_gpu_of_its_own() -> None:
    address = "ray://dpo-kuberay-head-svc:10001"
    (container,) = pods(VALUES["as it is"] | {"gpuWorker": {"rayAddress": address, "rayGrowsTo": "4x8x80"}})[
        "gpu-worker"
    ]["containers"]
    assert {"name": "DPO_RAY_ADDRESS", "value": address} in container["env"]
    assert {"name": "DPO_RAY_GROWS_TO", "value": "4x8x80"} in container["env"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    (alone,) = pods(VALUES["as it is"])["gpu-worker"]["containers"]
    assert alone["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "DPO_RAY_ADDRESS" not in {variable["name"] for variable in alone["env"]}


def test_the_values_of_kuberay_are_a_pod_of_kubernetes() -> None:
    """KubeRay's chart copies these fields into the pods of its machines."""
    values = yaml.safe_load((CHART / "kuberay.yaml").read_text())
    for name in ("head", "worker"):
        group = values[name]
        container = {"name": name, "image": "image", "resources": group["resources"]}
        container |= {"env": group.get("containerEnv", []), "volumeMounts": group.get("volumeMounts", [])}
        spec = {
            "containers": [container],
            "volumes": group.get("volumes", []),
            "tolerations": group.get("tolerations", []),
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in spec["volumes"]}
    known = {field.upper() for field in Settings.model_fields}
    assert all(variable["name"].removeprefix("DPO_") in known for variable in values["worker"]["containerEnv"])


def test_all_pods_keep_objects_on_the_claim_if_there_is_one() -> None:
    for name in VALUES:
        for spec in pods(VALUES[name]).values():
            (container,) = spec["containers"]
            variables = {variable["name"]: variable.get("value") for variable in container["env"]}
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            claims = {
                volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in spec["volumes"]
            }
            on_claim = name != "as it is"
            assert variables.get("DPO_STORAGE_URL") == ("file:///objects" if on_claim else None)
            assert (mounts.get("objects"), claims.get("objects")) == (
                ("/objects", "objects") if on_claim else (None, None)
            )
