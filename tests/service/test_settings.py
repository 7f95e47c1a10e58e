"""Settings from the environment, and nowhere else."""

import ipaddress
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import LOOPBACK, Settings, is_within, unknown_variables


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PORTCULLIS_{name.upper()}", raising=False)


def test_a_gateway_needs_no_setting_at_all():
    settings = Settings()
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "cpu")
    assert (settings.mode, settings.modes, settings.models) == ("flag", {}, ())
    assert settings.operators == LOOPBACK
    assert (settings.on_defense_error, settings.noise, settings.undefended_answer) == ("closed", True, False)
    assert settings.disclosure == "all"


def test_every_setting_is_described_and_read_from_its_variable(monkeypatch):
    given = {
        "store": ("/srv/store", Path("/srv/store")),
        "models": ("digits, letters@2 ,", ("digits", "letters@2")),
        "host": ("0.0.0.0", "0.0.0.0"),
        "port": ("0", 0),
        "device": ("cuda", "cuda"),
        "engine": ("torch", "torch"),
        "precision": ("fp16", "fp16"),
        "threads": ("2", 2),
        "lanes": ("3", 3),
        "mode": ("shadow", "shadow"),
        "modes": ('{"digits": "enforce"}', {"digits": "enforce"}),
        "disclose": ("verdict", "verdict"),
        "operators": ("10.0.0.0/8,::1", (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))),
        "undefended_answer": ("true", True),
        "on_defense_error": ("open", "open"),
        "noise": ("false", False),
        "max_body_bytes": ("1000", 1000),
        "max_pixels": ("100", 100),
        "max_images": ("3", 3),
        "max_batch": ("4", 4),
        "batch_wait_seconds": ("0.25", 0.25),
        "queue_images": ("5", 5),
        "queue_decodes": ("8", 8),
        "queue_bytes": ("9", 9),
        "request_seconds": ("1.5", 1.5),
        "shutdown_seconds": ("6", 6),
        "database": ("postgresql+asyncpg://db/alerts", "postgresql+asyncpg://db/alerts"),
        "alert_queue": ("7", 7),
        "alert_wait_seconds": ("0.5", 0.5),
        "inputs": ("/srv/inputs", Path("/srv/inputs")),
        "inputs_max_bytes": ("0", 0),
        "inputs_max_days": ("0.5", 0.5),
    }
    assert set(given) == set(Settings.model_fields), "this test names every setting"
    for name, (text, _) in given.items():
        monkeypatch.setenv(f"PORTCULLIS_{name.upper()}", text)
    settings = Settings()
    for name, (_, value) in given.items():
        assert getattr(settings, name) == value, name
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("device", "tpu"),
        ("engine", "tensorrt"),
        ("precision", "int8"),
        ("mode", "block"),
        ("modes", '{"digits": "block"}'),
        ("disclose", "everything"),
        ("operators", "10.0.0.0/33"),
        ("operators", "10.0.0.1/8"),
        ("operators", "everyone"),
        ("max_batch", "0"),
        ("batch_wait_seconds", "-0.001"),
        ("queue_images", "0"),
        ("queue_decodes", "0"),
        ("queue_bytes", "0"),
        ("request_seconds", "0"),
        ("inputs_max_bytes", "-1"),
        ("noise", "maybe"),
        ("on_defense_error", "ajar"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(monkeypatch, name, text):
    monkeypatch.setenv(f"PORTCULLIS_{name.upper()}", text)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert caught.value.errors()[0]["loc"][0] == name


def test_what_is_given_directly_wins_and_what_is_unknown_is_refused(monkeypatch):
    monkeypatch.setenv("PORTCULLIS_PORT", "1234")
    assert Settings(port=4321).port == 4321
    with pytest.raises(ValidationError, match="prot"):
        Settings(prot=1)
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


def test_a_model_has_the_mode_that_is_set_for_it():
    settings = Settings(mode="shadow", modes={"digits": "enforce"})
    assert settings.mode_of("digits") == "enforce"
    assert settings.mode_of("letters") == "shadow"


@pytest.mark.parametrize(
    ("host", "disclosed"),
    [
        ("127.0.0.1", "all"),
        ("127.5.6.7", "all"),
        ("localhost", "all"),
        ("::1", "all"),
        ("0.0.0.0", "label"),
        ("::", "label"),
        ("10.0.0.1", "label"),
        ("gateway.example", "label"),
    ],
)
def test_only_loopback_discloses_everything_by_itself(host, disclosed):
    assert Settings(host=host).disclosure == disclosed
    assert Settings(host=host, disclose="verdict").disclosure == "verdict"
    assert Settings(host=host, disclose="all").disclosure == "all"


@pytest.mark.parametrize(
    ("address", "networks", "within"),
    [
        ("127.0.0.1", LOOPBACK, True),
        ("::1", LOOPBACK, True),
        ("localhost", LOOPBACK, True),
        ("128.0.0.1", LOOPBACK, False),
        ("::ffff:127.0.0.1", LOOPBACK, False),
        ("", LOOPBACK, False),
        ("somewhere", LOOPBACK, False),
        ("10.2.3.4", Settings(operators="10.0.0.0/8").operators, True),
        ("11.2.3.4", Settings(operators="10.0.0.0/8").operators, False),
        ("127.0.0.1", Settings(operators="").operators, False),
        ("fe80::1%eth0", Settings(operators="fe80::/10").operators, True),
    ],
)
def test_an_address_lies_in_a_network_or_not(address, networks, within):
    assert is_within(address, networks) is within


def test_a_variable_that_is_no_setting_is_named(monkeypatch):
    monkeypatch.setenv("PORTCULLIS_MODDE", "enforce")
    monkeypatch.setenv("PORTCULLIS_MODE", "enforce")
    assert "PORTCULLIS_MODDE" in unknown_variables()
    assert "PORTCULLIS_MODE" not in unknown_variables()
