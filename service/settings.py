"""The gateway's settings, and the only place that reads the environment."""

import ipaddress
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Mode = Literal["flag", "enforce", "shadow"]
Disclosure = Literal["verdict", "label", "probabilities", "all"]
EngineName = Literal["auto", "onnx", "torch"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


class Settings(BaseSettings):
    """Every setting of the gateway; each is read from ``PORTCULLIS_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="PORTCULLIS_", frozen=True, extra="forbid")

    store: Path = Field(Path("var/store"), description="Folder of the model store.")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Models to serve, as `name` or `name@version`, separated by commas. Empty: every model."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where the graphs run. With `cuda` the gateway refuses to start without a working GPU."
    )
    engine: EngineName = Field(
        "auto",
        description="What computes the answers: `onnx`, `torch`, or `auto`, which is `onnx` but with `cuda`, and there "
        "`torch` where it is installed and can run the version.",
    )
    precision: Precision = Field(
        "auto",
        description="What answers are computed in: `fp32`, or with `torch` `bf16` or `fp16`. `auto` is `fp32`, but "
        "with `cuda` what is faster and leaves a version's answers what they are.",
    )
    threads: int = Field(
        0,
        ge=0,
        description="Threads that compute one batch. 0 with `lanes` 0: what suits the version; else 0 is every core.",
    )
    lanes: int = Field(
        0,
        ge=0,
        description="Batches of a model computed at once. 0 with `threads` 0: what suits the version; else 0 is 1, "
        "and 2 with `torch` on `cuda`.",
    )

    mode: Mode = Field("flag", description="What an alert does to the answer, for models that `modes` does not name.")
    modes: dict[str, Mode] = Field({}, description='Modes by model, as JSON: `{"digits": "enforce"}`.')
    disclose: Disclosure | None = Field(
        None, description="The most a client is told. Unset: `all` when listening on loopback, `label` elsewhere."
    )
    operators: Annotated[tuple[Network, ...], NoDecode] = Field(
        LOOPBACK, description="Networks whose clients may read alerts, separated by commas."
    )
    undefended_answer: bool = Field(
        False,
        description="Compute the bare classifier's answer for every image, in every mode, for the rest of its pass.",
    )
    on_defense_error: Literal["closed", "open"] = Field(
        "closed", description="When the defense itself fails: `closed` answers 503, `open` the bare answer, marked."
    )
    noise: bool = Field(True, description="Switch the defense's noise off with `false`: repeatable, and weaker.")

    max_body_bytes: int = Field(32 * 2**20, ge=1, description="The largest request body.")
    max_pixels: int = Field(25_000_000, ge=1, description="The most pixels that an image may decode to.")
    max_images: int = Field(256, ge=1, description="The most images in one request.")
    max_batch: int = Field(32, ge=1, description="The most images computed at once.")
    batch_wait_seconds: float = Field(
        0.002, ge=0, description="The longest that a batch waits for requests that are being decoded; for none others."
    )
    queue_images: int = Field(1024, ge=1, description="The most images that wait for a model; then 429.")
    queue_decodes: int = Field(64, ge=1, description="The most requests that wait to be decoded; then 429.")
    queue_bytes: int = Field(
        512 * 2**20, ge=1, description="The most bytes of request bodies that are held at once; then 429."
    )
    request_seconds: float = Field(30.0, gt=0, description="The longest that a request may take; then 504.")
    shutdown_seconds: int = Field(30, ge=1, description="How long a stop may take to finish what was accepted.")

    database: str = Field("sqlite+aiosqlite:///var/alerts.db", description="SQLAlchemy URL of the alert database.")
    alert_queue: int = Field(4096, ge=1, description="The most alerts that wait to be written.")
    alert_wait_seconds: float = Field(
        1.0, gt=0, description="How long an answer waits for room in a full alert queue; then 429."
    )
    inputs: Path = Field(Path("var/inputs"), description="Folder in which alerted inputs are kept.")
    inputs_max_bytes: int = Field(2**30, ge=0, description="The most that kept inputs may take; 0 keeps none.")
    inputs_max_days: float = Field(30.0, gt=0, description="How long an alerted input is kept.")

    @field_validator("models", "operators", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    def mode_of(self, model: str) -> Mode:
        """Return the mode in which a model is served."""
        return self.modes.get(model, self.mode)

    @cached_property
    def disclosure(self) -> Disclosure:
        """What a client may be told at most."""
        return self.disclose or ("all" if is_within(self.host, LOOPBACK) else "label")


def unknown_variables() -> list[str]:
    """Return the variables in the environment that look like a setting but are none: a misspelt one, perhaps."""
    known = {f"PORTCULLIS_{name.upper()}" for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith("PORTCULLIS_") and name not in known)


def is_within(address: str, networks: tuple[Network, ...]) -> bool:
    """Say whether an address, or the name localhost, lies in one of the networks."""
    try:
        parsed = ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
