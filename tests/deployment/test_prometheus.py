"""Prometheus' configuration and rules against the metrics that a gateway exposes."""

import re
import shutil
import subprocess

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from service.app import STATUS, create_app
from service.metrics import Metrics
from service.settings import Settings

OF_PROMETHEUS = {"job", "instance"}


def exposed(metrics: Metrics) -> dict[str, Counter | Gauge | Histogram]:
    """The instruments by the names under which Prometheus knows them."""
    found = {}
    for instrument in vars(metrics).values():
        if isinstance(instrument, Counter | Gauge | Histogram):
            (family,) = instrument.describe()
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
            found |= {family.name + suffix: instrument for suffix in suffixes}
    return found


@pytest.fixture
def rules(root):
    """The rules for alerts."""
    (group,) = yaml.safe_load((root / "docker" / "prometheus-rules.yml").read_text())["groups"]
    return group["rules"]


@pytest.fixture
def scenarios(root):
    """The situations in which promtool tries the rules."""
    return yaml.safe_load((root / "tests" / "deployment" / "prometheus_rules_test.yml").read_text())["tests"]


def test_prometheus_scrapes_the_gateway_where_it_serves_metrics(root, compose, image):
    config = yaml.safe_load((root / "docker" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose["services"]
    assert compose["services"][host]["build"]["target"] == "serve"
    assert port == image("serve")["EXPOSE"]
    assert scrape["metrics_path"] in create_app(Settings()).openapi()["paths"]


def test_prometheus_reads_the_rules_where_compose_mounts_them(root, compose):
    config = yaml.safe_load((root / "docker" / "prometheus.yml").read_text())
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["prometheus"]["volumes"])
    assert mounted["./prometheus.yml"] == "/etc/prometheus/prometheus.yml"
    assert [f"/etc/prometheus/{file}" for file in config["rule_files"]] == [mounted["./prometheus-rules.yml"]]


def test_rules_ask_for_metrics_that_are_exposed(rules):
    asked = {name for rule in rules for name in re.findall(r"\bportcullis_\w+", rule["expr"])}
    assert len(asked) >= 5
    assert asked <= exposed(Metrics()).keys()


def test_rules_are_tried_on_series_with_the_labels_that_metrics_have(scenarios):
    instruments = exposed(Metrics())
    written = {series["series"] for scenario in scenarios for series in scenario["input_series"]}
    ours = {series for series in written if series.startswith("portcullis_")}
    assert len(ours) >= 10
    for series in ours:
        labels = set(re.findall(r'(\w+)="', series))
        assert labels - OF_PROMETHEUS == set(instruments[series.partition("{")[0]]._labelnames), series


def test_rules_about_refusals_name_errors_that_the_gateway_refuses_with(rules):
    matched = [re.findall(r'reason=~"([^"]+)"', rule["expr"]) for rule in rules]
    reasons = {reason for patterns in matched for pattern in patterns for reason in pattern.split("|")}
    assert reasons
    assert reasons == {error.__name__ for error, status in STATUS.items() if status == 429}


def test_rules_speak_of_the_job_that_is_scraped(rules, root):
    config = yaml.safe_load((root / "docker" / "prometheus.yml").read_text())
    jobs = {job for rule in rules for job in re.findall(r'job="(\w+)"', rule["expr"])}
    assert jobs == {scrape["job_name"] for scrape in config["scrape_configs"]}


def test_every_rule_says_what_is_wrong_and_how_bad_it_is(rules):
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_every_rule_is_tried_when_it_fires_and_when_it_keeps_still(rules, scenarios):
    checks = [check for scenario in scenarios for check in scenario["alert_rule_test"]]
    names = {rule["alert"] for rule in rules}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == names


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "docker/prometheus.yml"),
        ("check", "rules", "docker/prometheus-rules.yml"),
        ("test", "rules", "tests/deployment/prometheus_rules_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(root, arguments):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed.")
    done = subprocess.run(["promtool", *arguments], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
