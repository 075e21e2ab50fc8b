"""The manifests are what Kubernetes takes, strictly, and name commands, settings, paths and a table that exist."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import SecretStr
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from app.cli.main import build_command
from app.main import create_app
from app.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "k8s"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())

Manifest = dict[str, Any]

TEXT = {"type": "string"}
KEDA = {  # of the custom resource definitions of KEDA 2.17, what is used here
    "ScaledObject": {
        "type": "object",
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {"required": ["name"], "additionalProperties": False, "properties": {"name": TEXT}},
            "minReplicaCount": {"type": "integer"},
            "maxReplicaCount": {"type": "integer"},
            "pollingInterval": {"type": "integer"},
            "cooldownPeriod": {"type": "integer"},
            "advanced": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "horizontalPodAutoscalerConfig": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"behavior": {"type": "object"}},
                    }
                },
            },
            "triggers": {
                "items": {
                    "type": "object",
                    "required": ["type", "metadata", "authenticationRef"],
                    "additionalProperties": False,
                    "properties": {
                        "type": {"const": "postgresql"},
                        "metadata": {
                            "type": "object",
                            "required": ["query", "targetQueryValue"],
                            "additionalProperties": False,
                            "properties": {"query": TEXT, "targetQueryValue": TEXT},
                        },
                        "authenticationRef": {"required": ["name"], "additionalProperties": TEXT},
                    },
                }
            },
        },
    },
    "TriggerAuthentication": {
        "type": "object",
        "additionalProperties": False,
        "required": ["secretTargetRef"],
        "properties": {
            "secretTargetRef": {
                "items": {
                    "type": "object",
                    "required": ["parameter", "name", "key"],
                    "additionalProperties": TEXT,
                }
            }
        },
    },
}


def manifests() -> list[Manifest]:
    texts = [(FOLDER / name).read_text() for name in KUSTOMIZATION["resources"]]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text)]


def named(kind: str, name: str) -> Manifest:
    (found,) = [each for each in manifests() if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def pods() -> dict[str, Manifest]:
    """The specs of all pods, by their container."""
    found = [each["spec"]["template"]["spec"] for each in manifests() if each["kind"] in ("Deployment", "Job")]
    return {pod["containers"][0]["name"]: pod for pod in found}


@pytest.mark.parametrize("manifest", manifests(), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_a_cluster_takes_it(manifest: Manifest) -> None:
    if manifest["apiVersion"].startswith("keda.sh/"):
        jsonschema.validate(manifest["spec"], KEDA[manifest["kind"]])
        return
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_every_file_is_applied() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*KUSTOMIZATION["resources"], "kustomization.yaml"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_it() -> None:
    built = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=True)
    for manifest in yaml.safe_load_all(built.stdout):
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "emender"
        if manifest["kind"] == "Deployment":  # the network policy holds it
            assert manifest["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/part-of"] == "emender"


@pytest.mark.parametrize("pod", list(pods().values()), ids=list(pods()))
def test_pods_may_do_little(pod: Manifest) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    (container,) = pod["containers"]
    allowed = container["securityContext"]
    assert allowed["readOnlyRootFilesystem"] and not allowed["allowPrivilegeEscalation"]
    assert allowed["capabilities"] == {"drop": ["ALL"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, *words = container["command"]
    assert program == "emender"
    assert CliRunner().invoke(build_command(), [*words, "--help"]).exit_code == 0


def test_settings_exist() -> None:
    literals = [
        literal.partition("=")[0] for each in KUSTOMIZATION["configMapGenerator"] for literal in each["literals"]
    ]
    given = [variable["name"] for pod in pods().values() for variable in pod["containers"][0].get("env", [])]
    for name in literals + given:
        assert name.removeprefix("EMENDER_").lower() in Settings.model_fields
        assert not any(word in name for word in ("SECRET", "PASSWORD", "URL", "WEBHOOK_KEY"))


def test_who_is_given_which_secret() -> None:
    secrets = {
        name: {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        for name, pod in pods().items()
    }
    assert secrets == {
        "migrate": {"emender-owner"},
        "api": {"emender"},
        "worker": {"emender", "emender-signing-key"},
    }
    assert not [each for each in manifests() if each["kind"] == "Secret"]


def test_probes_ask_for_what_is_there() -> None:
    (api,) = pods()["api"]["containers"]
    paths = create_app(Settings(database_url=SecretStr("postgresql://nowhere/emender"))).openapi()["paths"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert api[probe]["httpGet"]["path"] in paths
    assert api["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_the_autoscaler_counts_jobs(engine: Engine) -> None:
    (trigger,) = named("ScaledObject", "emender-worker")["spec"]["triggers"]
    assert int(trigger["metadata"]["targetQueryValue"]) == Settings().edit_batch_size
    with engine.connect() as connection:
        assert connection.scalar(text(trigger["metadata"]["query"])) == 0
    assert "replicas" not in named("Deployment", "emender-worker")["spec"]
