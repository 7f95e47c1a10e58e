"""What holds for the application as a whole: its routes, its errors, and what it can do without."""

import importlib
import inspect
import subprocess
import sys
import textwrap

import httpx
import pytest
from fastapi import HTTPException, Request, Response

from service.app import STATUS, create_app
from service.settings import Settings

ROUTES = {
    ("GET", "/v2"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    ("GET", "/v2/models/{model}"),
    ("GET", "/v2/models/{model}/versions/{version}"),
    ("GET", "/v2/models/{model}/ready"),
    ("GET", "/v2/models/{model}/versions/{version}/ready"),
    ("POST", "/v2/models/{model}/infer"),
    ("POST", "/v2/models/{model}/versions/{version}/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v1/models/{model}/predict"),
    ("GET", "/v1/models"),
    ("GET", "/v1/alerts"),
    ("GET", "/v1/alerts/{id}"),
    ("GET", "/v1/alerts/{id}/image"),
    ("GET", "/metrics"),
}


def test_every_route_is_described_and_documents_its_errors():
    described = create_app(Settings()).openapi()
    operations = {
        (method.upper(), path): operation
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) >= ROUTES
    assert described["components"]["schemas"]["ErrorBody"]["required"] == ["error"]
    for route, operation in operations.items():
        assert operation["description"].endswith((".", ".\n")), route
        for status in sorted({str(status) for status in STATUS.values()}):
            content = operation["responses"][status]["content"]["application/json"]
            assert content["schema"]["$ref"].endswith("/ErrorBody"), (route, status)


async def test_the_documentation_is_served_and_names_both_ways_to_send_an_image(visitor_of_nothing):
    described = (await visitor_of_nothing.get("/openapi.json")).json()
    body = described["paths"]["/v1/models/{model}/predict"]["post"]["requestBody"]
    assert set(body["content"]) == {"image/png", "image/jpeg", "image/webp", "multipart/form-data"}
    assert (await visitor_of_nothing.get("/docs")).status_code == 200


@pytest.fixture
async def visitor_of_nothing(tmp_path):
    """A client of a gateway with an empty store, and with a route that fails."""
    settings = Settings(
        store=tmp_path / "store",
        database=f"sqlite+aiosqlite:///{tmp_path / 'alerts.db'}",
        inputs=tmp_path / "inputs",
    )
    app = create_app(settings)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a secret of the inside")

    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client


async def test_an_unexpected_failure_tells_the_log_and_not_the_client(visitor_of_nothing, caplog):
    answer = await visitor_of_nothing.get("/broken")
    assert answer.status_code == 500
    assert answer.json() == {"error": "The gateway failed on this request; its log says more."}
    assert "a secret of the inside" in caplog.text


async def test_what_is_answered_directly_is_a_route_like_any_other_and_fails_like_any_other(tmp_path, caplog):
    settings = Settings(
        store=tmp_path, database=f"sqlite+aiosqlite:///{tmp_path / 'alerts.db'}", inputs=tmp_path / "in"
    )
    app = create_app(settings)

    async def broken(request: Request, name: str) -> Response:
        if name == "lost":
            raise HTTPException(404, "Nothing here")
        raise RuntimeError(f"a secret of the inside of {name}")

    app.answer_directly("/broken/{name}", broken)
    described = app.openapi()["paths"]
    assert [path for path in app.direct_paths if "post" not in described.get(path, {})] == ["/broken/{name}"]
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            failed = await client.post("/broken/one")
            assert failed.status_code == 500
            assert failed.json() == {"error": "The gateway failed on this request; its log says more."}
            assert "a secret of the inside of one" in caplog.text
            lost = await client.post("/broken/lost")
            assert (lost.status_code, lost.json()) == (404, {"error": "Nothing here: POST /broken/lost."})
            assert (await client.get("/broken/one")).status_code == 404


@pytest.mark.parametrize(
    ("module", "not_in_a_request"),
    [
        ("service.oip.messages", set()),
        ("service.images", set()),
        ("service.disclosure", set()),
        ("service.uploads", set()),
        ("service.body_limit", set()),
        ("service.batching", set()),
        ("service.deadlines", set()),
        ("service.decoding", set()),
        ("service.departures", set()),
        ("service.direct", set()),
        (
            "service.engines.errors",
            {"GraphUnloadable", "VersionUnsuitable", "DeviceUnavailable", "EngineUnavailable"},
        ),
        ("service.served", set()),
        ("service.repository", set()),
        ("service.gateway", set()),
        ("service.routes.alerts", set()),
        ("service.routes.dependencies", set()),
        (
            "service.alerts.errors",
            {
                *("AlertError", "DatabaseUnsuitable", "AlertsNotWritten"),  # the root, a start's and a stop's
                *("AlertIdInvalid", "MediaTypeUnsupported", "PageInvalid"),  # which the routes' own checks keep out
            },
        ),
    ],
)
def test_every_error_that_a_request_may_end_in_has_a_status(module, not_in_a_request):
    found = importlib.import_module(module)
    errors = {
        name: error
        for name, error in inspect.getmembers(found, inspect.isclass)
        if issubclass(error, Exception) and error.__module__ == module
    }
    assert {name for name, error in errors.items() if error not in STATUS} == not_in_a_request


SERVES_WITHOUT = """
import asyncio, sys

for name in ("torch", "torchvision", "sklearn", "safetensors", "foolbox", "art", "pyautoattack", "onnxscript"):
    sys.modules[name] = None

import httpx
import numpy as np

import service.cli
from service.app import create_app
from service.settings import Settings

async def main():
    app = create_app(Settings())
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            while (await client.get("/v2/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 16, 16], "data": [230] * 256}
            answer = await client.post("/v2/models/digits/infer", json={"inputs": [tensor]})
            print(answer.status_code, answer.json()["outputs"][2]["data"])

asyncio.run(main())
print("defenses" in sys.modules)
"""


def test_serving_needs_nothing_that_only_fitting_does(store, tmp_path, monkeypatch):
    for name, value in {
        "STORE": str(store),
        "MODELS": "digits",
        "DATABASE": f"sqlite+aiosqlite:///{tmp_path / 'alerts.db'}",
        "INPUTS": str(tmp_path / "inputs"),
    }.items():
        monkeypatch.setenv(f"PORTCULLIS_{name}", value)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SERVES_WITHOUT)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["200 ['alert']", "False"], done.stderr
