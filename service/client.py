"""A client of the gateway's own protocol, for measuring it from outside."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from service.settings import Mode

OUTPUTS = ("class_index", "verdict")


class GatewayUnreachable(OSError):
    """No gateway answers at the address."""

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        super().__init__(f"No gateway answers at {url}: {reason}.")


class GatewayRefused(OSError):
    """The gateway answered a request with an error."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(f"The gateway answered {status}: {text}")


@dataclass(frozen=True)
class Served:
    """Which version of a model is in service, and in which mode."""

    version: str
    mode: Mode


@dataclass(frozen=True)
class Told:
    """What the gateway told of N images.

    ``class_index`` (N,) int64, -1 where withheld; ``alerted`` (N,) bool.
    """

    class_index: np.ndarray
    alerted: np.ndarray


class Client:
    """Ask a gateway at ``url`` about tensors of images."""

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str) -> dict[str, object]:
        """Return a route's JSON; raises ``GatewayRefused`` and ``GatewayUnreachable``."""
        answer: dict[str, object] = self._ask("GET", path).json()
        return answer

    def served(self, model: str) -> Served:
        """Return what a call without a version gets."""
        models = self.get("/v1/models")["models"]
        assert isinstance(models, list)
        for info in models:
            if info["name"] == model and info["default"]:
                return Served(str(info["version"]), info["mode"])
        raise GatewayRefused(404, f"Model {model} is not in service.")

    def classify(self, model: str, images: np.ndarray, batch_size: int = 32) -> Told:
        """Return what the gateway tells of images uint8 (N, C, H, W), sent as binary tensors.

        Raises ``GatewayRefused`` and ``GatewayUnreachable``.
        """
        answers = [
            self._infer(model, images[first : first + batch_size], OUTPUTS)
            for first in range(0, len(images), batch_size)
        ]
        joined = {name: [value for answer in answers for value in answer[name]] for name in OUTPUTS}
        return Told(
            class_index=np.array(joined["class_index"], np.int64),
            alerted=np.array([verdict == "alert" for verdict in joined["verdict"]], bool),
        )

    def _infer(self, model: str, images: np.ndarray, outputs: Iterable[str]) -> Mapping[str, list[object]]:
        data = np.ascontiguousarray(images).tobytes()
        image = {
            "name": "image",
            "datatype": "UINT8",
            "shape": list(images.shape),
            "parameters": {"binary_data_size": len(data)},
        }
        header = json.dumps({"inputs": [image], "outputs": [{"name": name} for name in outputs]}).encode()
        answer = self._ask(
            "POST",
            f"/v2/models/{model}/infer",
            content=header + data,
            headers={"Inference-Header-Content-Length": str(len(header))},
        )
        return {output["name"]: output["data"] for output in answer.json()["outputs"]}

    def _ask(self, method: str, path: str, **parts: Any) -> httpx.Response:
        try:
            return _checked(self._http.request(method, path, **parts))
        except httpx.TransportError as error:
            raise GatewayUnreachable(str(self._http.base_url), str(error)) from error


def pages(client: Client, path: str) -> Iterator[dict[str, object]]:
    """Yield every alert that ``path`` lists, following the cursors."""
    after = ""
    separator = "&" if "?" in path else "?"
    while True:
        page = client.get(f"{path}{separator}limit=1000{after}")
        alerts = page["alerts"]
        assert isinstance(alerts, list)
        yield from alerts
        if page["next"] is None:
            return
        after = f"&after={page['next']}"


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        try:
            text = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            text = answer.text[:200]
        raise GatewayRefused(answer.status_code, text)
    return answer
