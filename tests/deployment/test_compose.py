"""The compose file against the image, the settings and the files it mounts."""

import ipaddress
import re
from typing import Any

import pytest

from service.settings import is_within
from service.version import VERSION


def environment_of(image: dict[str, Any], service: dict[str, Any]) -> dict[str, str]:
    return image["ENV"] | service.get("environment", {})


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """What is mounted, by its path in the container, and whether it can be written."""
    words = [volume.split(":") for volume in service["volumes"]]
    return {target: (source, mode != ["ro"]) for source, target, *mode in words}


@pytest.mark.parametrize("service", ["gateway", "cli"])
def test_a_service_builds_a_stage_of_the_dockerfile(compose, stages, root, service):
    build = compose["services"][service]["build"]
    context = root / "docker" / build["context"]
    assert context.resolve() == root.resolve()
    assert (context / build["dockerfile"]).is_file()
    assert build["target"] in stages


def test_images_of_ours_carry_the_projects_version(compose):
    services = compose["services"]
    assert services["gateway"]["image"] == f"portcullis:{VERSION}"
    assert services["cli"]["image"] == f"portcullis-fit:{VERSION}"


def test_the_gateways_environment_makes_settings(compose, image, settings_of):
    service = compose["services"]["gateway"]
    assert all(isinstance(value, str) for value in service["environment"].values())
    assert settings_of(environment_of(image("serve"), service)).disclosure == "label"


def test_a_port_is_published_on_loopback_and_leads_to_the_one_listened_on(compose, image, settings_of):
    service = compose["services"]["gateway"]
    (published,) = service["ports"]
    host, _, inner = published.split(":")
    assert host == "127.0.0.1"
    assert int(inner) == settings_of(environment_of(image("serve"), service)).port
    assert compose["services"]["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]


def test_operators_are_whoever_is_on_the_compose_network_and_loopback(compose, image, settings_of):
    settings = settings_of(environment_of(image("serve"), compose["services"]["gateway"]))
    (configured,) = compose["networks"]["default"]["ipam"]["config"]
    network = ipaddress.ip_network(configured["subnet"])
    assert network.is_private
    assert set(settings.operators) == {ipaddress.ip_network("127.0.0.0/8"), network}
    assert is_within(str(next(network.hosts())), settings.operators)


def test_a_stop_leaves_time_to_finish_requests_and_to_write_alerts(compose, image, settings_of, longest_stop):
    service = compose["services"]["gateway"]
    settings = settings_of(environment_of(image("serve"), service))
    grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert int(grace[1]) > longest_stop(settings)


def test_what_the_settings_name_is_mounted_and_only_the_data_can_be_written(compose, image, settings_of):
    service = compose["services"]["gateway"]
    settings = settings_of(environment_of(image("serve"), service))
    mounted = mounts(service)
    assert mounted[str(settings.store)] == ("store", False)
    assert mounted["/data"] == ("data", True)
    assert settings.inputs.is_relative_to("/data")
    assert settings.database.startswith("sqlite+aiosqlite:////data/")
    assert service["read_only"] is True
    assert [entry.partition(":")[0] for entry in service["tmpfs"]] == ["/tmp"]


def test_the_command_line_writes_the_store_that_the_gateway_reads(compose, image, settings_of):
    settings = settings_of(environment_of(image("fit"), compose["services"]["cli"]))
    assert mounts(compose["services"]["cli"]) == {str(settings.store): ("store", True)}
    assert compose["services"]["cli"]["profiles"] == ["cli"]


def test_every_mount_is_a_declared_volume_or_a_file_here(compose, root):
    declared = set(compose["volumes"])
    for service in compose["services"].values():
        for source, _ in mounts(service).values():
            assert source in declared or (source.startswith("./") and (root / "docker" / source).is_file()), source


def test_the_gateway_is_checked_by_its_image_and_prometheus_by_compose(compose, image):
    assert image("serve")["HEALTHCHECK"]
    assert "healthcheck" not in compose["services"]["gateway"]
    assert compose["services"]["prometheus"]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("service", ["gateway", "cli", "prometheus"])
def test_no_service_has_capabilities_or_can_gain_privileges(compose, service):
    assert compose["services"][service]["cap_drop"] == ["ALL"]
    assert compose["services"][service]["security_opt"] == ["no-new-privileges:true"]
