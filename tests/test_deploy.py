"""What the deployment's files promise each other and the program: lists of packages, settings, users, times, ports.

The formats themselves are checked by .ci/manifests, nginx in tests/faults/test_door.py, the images by .ci/images.
"""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import Settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WATCHING = ("./prometheus", "./grafana/")
MARGIN_S = 10.0  # that a keeper waits beyond the drain
MANIFESTS = [
    (path.name, document)
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """The base's objects of that kind, by name."""
    base = yaml.safe_load_all(
        "\n---\n".join(p.read_text() for p in sorted((DEPLOY / "kubernetes/base").glob("*.yaml")))
    )
    return {found["metadata"]["name"]: found for found in base if found["kind"] == kind}


# --- the images ------------------------------------------------------------------------------------------------------


def needed(*roots: Requirement) -> set[str]:
    """Every distribution that these need, as they are installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in importlib.metadata.requires(wanted.name) or ():
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                todo.append(more)
    return {name for name, _ in seen}


def listed(name: str) -> list[str]:
    lines = (DEPLOY / "requirements" / name).read_text().splitlines()
    return [line for line in lines if "#" not in line and ";" not in line]


def test_the_images_get_what_pyproject_asks_for_and_nothing_else() -> None:
    asked = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    without_torch = needed(*(wanted for wanted in asked if wanted.name != "torch"))
    assert listed("api.txt") == sorted(without_torch)
    assert listed("worker.txt") == sorted(needed(*asked) - without_torch - {"torch"})
    pins = {
        canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    }
    assert needed(*asked) <= pins


def test_the_dockerfile_names_only_settings_that_there_are() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert_settings(re.findall(r"\b(MILLRACE_\w+)=", text))
    assert text.count("USER 10001") == text.count("HEALTHCHECK") == text.count('tini", "--", "millrace') == 3


def assert_settings(names: list[str]) -> None:
    known = {f"MILLRACE_{name.upper()}" for name in Settings.model_fields}
    assert names and set(names) <= known, set(names) - known


# --- compose ---------------------------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_compose_names_only_settings_that_there_are() -> None:
    for service in SERVICES.values():
        if service["image"].startswith("millrace-") and "environment" in service:
            assert_settings(list(service["environment"]))


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_hardened_limited_and_pinned(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert re.search(r":(\$\{VERSION:-)?v?\d+\.\d+\.\d+", service["image"]), "a version, to the last number"
    assert "healthcheck" in service and service["profiles"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    published = bool(service.get("ports"))
    assert ("front" in service["networks"]) == published, "only who is published is in a network that leads out"


def test_compose_starts_and_stops_in_order() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            disabled = SERVICES[other]["healthcheck"].get("disable", False)
            assert (how["condition"] == "service_completed_successfully") == disabled, f"{name} after {other}"
            assert set(service["profiles"]) <= set(SERVICES[other]["profiles"])
    for name in ("api-1", "api-2", "worker-cpu", "worker-gpu"):
        drain_s = float(SERVICES[name]["environment"]["MILLRACE_DRAIN_S"])
        assert seconds(SERVICES[name]["stop_grace_period"]) > drain_s + MARGIN_S
    assert seconds(SERVICES["door"]["stop_grace_period"]) > seconds(SERVICES["api-1"]["stop_grace_period"])
    assert COMPOSE["networks"]["back"]["internal"] is True


def test_one_service_computes_in_each_profile_and_the_gpu_s_has_one() -> None:
    assert [SERVICES[f"worker-{profile}"]["profiles"] for profile in ("cpu", "gpu")] == [["cpu"], ["gpu"]]
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert not any("reservations" in SERVICES[n]["deploy"]["resources"] for n in SERVICES if n != "worker-gpu")


def mounted() -> Iterator[str]:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            if isinstance(volume, dict) and not volume["source"].startswith("$"):
                yield volume["source"]


def test_what_compose_mounts_is_there_or_made_by_the_one_command(tmp_path: Path) -> None:
    """And that command makes what `api` reads as a key, and what Redis reads as users."""
    program = tmp_path / "millrace"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m service.cli "$@"\n')
    program.chmod(0o755)
    made = tmp_path / "secrets"
    environment = {"PATH": "/usr/bin:/bin", "SECRETS": str(made), "MILLRACE": str(program), "PYTHONPATH": str(ROOT)}
    command = ["sh", str(DEPLOY / "keys.sh"), "ada"]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert re.fullmatch(r"mr-\S+\n", first.stdout) and first.stdout != second.stdout
    assert "SHA256_OF" not in (made / "users.acl").read_text()
    assert made.stat().st_mode & 0o777 == 0o700 and (made / "keys/keys.json").stat().st_mode & 0o777 == 0o644
    for source in {*mounted(), *(secret["file"] for secret in COMPOSE["secrets"].values())}:
        if source.startswith(WATCHING) and not (DEPLOY / "prometheus").exists():
            continue  # a tree without what watches
        there = made / source.removeprefix("./secrets/") if source.startswith("./secrets/") else DEPLOY / source
        assert there.exists(), source


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def pods() -> dict[str, dict[str, Any]]:
    """What runs, by name: the pod's specification."""
    found = {**of_kind("Deployment"), **of_kind("Job")}
    return {name: workload["spec"]["template"]["spec"] for name, workload in found.items()}


@pytest.mark.parametrize("name", ["api", "worker", "functions"])
def test_every_pod_is_hardened_and_knows_its_settings(name: str) -> None:
    pod = pods()[name]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in container["resources"]["limits"]
    assert_settings([entry["name"] for entry in container["env"]])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_shared_settings_are_settings_and_a_pod_is_given_time_to_drain() -> None:
    (generated,) = (doc for _, doc in MANIFESTS if "configMapGenerator" in doc)
    literals = dict(line.split("=") for line in generated["configMapGenerator"][0]["literals"])
    assert_settings(list(literals))
    for name in ("api", "worker"):
        pod = pods()[name]
        pause_s = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        least_s = pause_s + float(literals["MILLRACE_DRAIN_S"]) + MARGIN_S
        assert pod["terminationGracePeriodSeconds"] >= least_s


def test_what_scales_points_at_what_there_is() -> None:
    (scaled,) = of_kind("ScaledObject").values()
    assert set(scaled["spec"]) <= {
        *("scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"),
        *("fallback", "advanced", "triggers"),
    }
    assert scaled["spec"]["scaleTargetRef"]["name"] in of_kind("Deployment")
    assert scaled["spec"]["minReplicaCount"] >= 1, "an api without any worker refuses"
    (trigger,) = scaled["spec"]["triggers"]
    assert {"millrace_requests_waiting", "millrace_requests_running"} <= set(
        re.findall(r"\w+", trigger["metadata"]["query"])
    )
    for name, scaler in of_kind("HorizontalPodAutoscaler").items():
        assert scaler["spec"]["scaleTargetRef"]["name"] == name
    assert not any("replicas" in workload["spec"] for workload in of_kind("Deployment").values())


def test_monitors_and_policies_name_ports_and_components_that_there_are() -> None:
    ports = {port["name"] for name in ("api", "worker") for port in pods()[name]["containers"][0]["ports"]}
    (service,) = of_kind("ServiceMonitor").values()
    (pod,) = of_kind("PodMonitor").values()
    assert {end["port"] for end in (*service["spec"]["endpoints"], *pod["spec"]["podMetricsEndpoints"])} <= ports
    told = re.findall(r"values: \[([^]]*)\]", (DEPLOY / "kubernetes/base/networkpolicy.yaml").read_text())
    assert {name for values in told for name in values.split(", ")} == set(pods())
