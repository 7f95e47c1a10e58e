"""The manifests against the Kubernetes schemas, the images and the settings."""

import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.version import VERSION

KUBERNETES = "1.37"
UNITS = {"Mi": 2**20, "Gi": 2**30}


def size(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


@pytest.fixture
def gateway_pod(gateway_manifests) -> dict[str, Any]:
    """The gateway's pod."""
    (deployment,) = gateway_manifests["Deployment"]
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def gateway_settings(image, gateway_config, settings_of):
    """The settings that the gateway's pod ends up with."""
    return settings_of(image("serve")["ENV"] | gateway_config)


def test_every_manifest_in_a_folder_is_listed_and_the_other_way_round(folder):
    files = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert set(files) == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}


def test_every_manifest_is_valid(folder, manifests_of):
    for manifest in manifests_of(folder):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_kubectl_renders_valid_manifests_with_images_of_this_version(folder, manifests_of):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed.")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert len(rendered) >= len(manifests_of(folder))
    for manifest in rendered:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        for container in manifest.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            assert container["image"] in (f"portcullis:{VERSION}", f"portcullis-fit:{VERSION}")


def test_images_are_tagged_with_the_projects_version(folder, pod):
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    (container,) = pod["containers"]
    assert kustomization["images"] == [{"name": container["image"], "newTag": VERSION}]


def test_a_pod_runs_with_no_more_rights_than_it_needs(pod, image):
    user, group = (int(number) for number in image("serve")["USER"].split(":"))
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_pod_gets_no_service_links_which_would_set_the_port_to_a_url(pod):
    assert pod["enableServiceLinks"] is False


def test_a_service_of_this_name_would_indeed_set_the_port(gateway_manifests, gateway_config, image, settings_of):
    (service,) = gateway_manifests["Service"]
    link = f"{service['metadata']['name'].upper()}_PORT"
    with pytest.raises(ValueError, match="port"):
        settings_of(image("serve")["ENV"] | gateway_config | {link: "tcp://10.96.0.1:8000"})


def test_a_pod_mounts_what_it_declares_and_can_write_temporary_files(pod):
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount for mount in container["volumeMounts"]}
    declared = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted.keys() == declared.keys()
    assert mounted["tmp"]["mountPath"] == "/tmp"
    assert "emptyDir" in declared["tmp"]


def test_a_pod_asks_for_what_it_needs_and_is_bounded_in_memory(pod):
    (container,) = pod["containers"]
    resources = container["resources"]
    assert size(resources["requests"]["memory"]) <= size(resources["limits"]["memory"])
    assert int(resources["requests"]["cpu"]) >= 1


def test_the_gateways_config_makes_settings(gateway_settings):
    assert gateway_settings.host == "0.0.0.0"
    assert gateway_settings.disclosure == "label"


def test_a_gateway_computes_in_as_many_lanes_as_it_has_cpus(gateway_pod, gateway_settings):
    assert gateway_settings.threads == 1
    assert gateway_settings.lanes == int(gateway_pod["containers"][0]["resources"]["requests"]["cpu"])


def test_the_pod_takes_its_config_from_the_one_that_is_generated(root, gateway_pod):
    kustomization = yaml.safe_load((root / "k8s" / "base" / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    assert gateway_pod["containers"][0]["envFrom"] == [{"configMapRef": {"name": generated["name"]}}]


def test_the_port_is_the_same_from_the_service_to_the_settings(gateway_manifests, gateway_pod, gateway_settings):
    (port,) = gateway_pod["containers"][0]["ports"]
    (service,) = gateway_manifests["Service"]
    (deployment,) = gateway_manifests["Deployment"]
    assert port["containerPort"] == gateway_settings.port
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(gateway_settings.port)
    (policy,) = gateway_manifests["NetworkPolicy"]
    assert policy["spec"]["ingress"] == [{"ports": [{"port": port["name"]}]}]


def test_everything_that_selects_the_gateway_finds_it(gateway_manifests, root, manifests_of):
    (deployment,) = gateway_manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        gateway_manifests["Service"][0]["spec"]["selector"],
        gateway_manifests["NetworkPolicy"][0]["spec"]["podSelector"]["matchLabels"],
    ]
    for folder in ("fit", "register"):
        (job,) = manifests_of(root / "k8s" / folder)
        affinity = job["spec"]["template"]["spec"]["affinity"]["podAffinity"]
        (term,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        selectors.append(term["podAffinityTerm"]["labelSelector"]["matchLabels"])
        assert not labels.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_the_gateway_reaches_nothing(gateway_manifests):
    (policy,) = gateway_manifests["NetworkPolicy"]
    assert "Egress" in policy["spec"]["policyTypes"]
    assert policy["spec"]["egress"] == []


def test_probes_ask_the_port_that_listens(gateway_pod):
    (container,) = gateway_pod["containers"]
    for kind in ("startup", "readiness", "liveness"):
        assert container[f"{kind}Probe"]["httpGet"]["port"] == container["ports"][0]["name"]


def test_readiness_waits_for_the_models_and_liveness_does_not(gateway_pod):
    (container,) = gateway_pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


def test_a_stop_leaves_time_to_finish_requests_and_to_write_alerts(gateway_pod, gateway_settings, longest_stop):
    before = gateway_pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = before + longest_stop(gateway_settings)
    assert gateway_pod["terminationGracePeriodSeconds"] > needed


def test_a_gateway_on_sqlite_is_one_and_is_gone_before_the_next(gateway_manifests, gateway_settings):
    assert gateway_settings.database.startswith("sqlite")
    (deployment,) = gateway_manifests["Deployment"]
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_the_gateway_reads_the_store_and_writes_data(gateway_pod, gateway_settings):
    mounted = {mount["mountPath"]: mount for mount in gateway_pod["containers"][0]["volumeMounts"]}
    assert mounted[str(gateway_settings.store)]["readOnly"] is True
    assert not mounted["/data"].get("readOnly")
    assert gateway_settings.inputs.is_relative_to("/data")
    assert gateway_settings.database.startswith("sqlite+aiosqlite:////data/")


def test_the_data_claim_has_room_for_the_inputs_that_are_kept(gateway_manifests, gateway_settings):
    (claim,) = [
        claim for claim in gateway_manifests["PersistentVolumeClaim"] if claim["metadata"]["name"] == "portcullis-data"
    ]
    assert size(claim["spec"]["resources"]["requests"]["storage"]) > 2 * gateway_settings.inputs_max_bytes


def test_claims_are_made_here_save_that_of_the_images(pod, gateway_manifests):
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    }
    made = {claim["metadata"]["name"] for claim in gateway_manifests["PersistentVolumeClaim"]}
    assert "portcullis-store" in claims
    assert claims - made <= {"portcullis-images"}


@pytest.mark.parametrize("folder_name", ["fit", "register"])
def test_a_job_writes_the_store_that_the_gateway_reads(root, image, settings_of, folder_name, manifests_of):
    (job,) = manifests_of(root / "k8s" / folder_name)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (store,) = [mount for mount in container["volumeMounts"] if mount["name"] == "store"]
    assert store["mountPath"] == str(settings_of(image("fit")["ENV"]).store)
    assert not store.get("readOnly")


def test_the_fit_is_on_the_images_mounted_and_promotes(root, manifests_of):
    (job,) = manifests_of(root / "k8s" / "fit")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["fit", "coophance"]
    assert "--promote" in container["args"]
    data = container["args"][container["args"].index("--data") + 1]
    assert data in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_a_fit_computes_with_as_many_threads_as_it_has_cpus(root, manifests_of):
    (job,) = manifests_of(root / "k8s" / "fit")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (threads,) = [each["value"] for each in container["env"] if each["name"] == "OMP_NUM_THREADS"]
    assert threads == container["resources"]["requests"]["cpu"]
