"""The gateway as an ASGI application."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.alerts import (
    AlertLog,
    AlertLogUnavailable,
    AlertNotFound,
    AlertQueueFull,
    AlertWriter,
    AlertWriterStopped,
    ImageNotKept,
    Vault,
)
from service.batching import BatcherClosed, QueueFull
from service.body_limit import BodiesFull, BodyBudget, BodyLimit, BodyTooLarge
from service.cores import cores
from service.deadlines import RequestTimedOut
from service.decoding import DecodeQueueFull, Decoder
from service.departures import Departures
from service.direct import DirectApp
from service.disclosure import OutputUnknown, OutputWithheld
from service.engines.opening import check_engine
from service.gateway import Gateway
from service.images import ImageRefused, TensorRefused
from service.metrics import Metrics
from service.oip import OipMalformed
from service.repository import ModelNotFound, ModelUnavailable, Repository
from service.routes import alerts, images, open_inference
from service.routes.alerts import OperatorsOnly
from service.routes.dependencies import TimeoutMalformed
from service.schemas import ErrorBody
from service.served import DefenseFailed
from service.settings import Settings
from service.version import VERSION

logger = logging.getLogger("portcullis")

STATUS: Mapping[type[Exception], int] = {
    OipMalformed: 400,
    TensorRefused: 400,
    ImageRefused: 400,
    OutputUnknown: 400,
    ClientDisconnect: 400,
    OutputWithheld: 403,
    OperatorsOnly: 403,
    ModelNotFound: 404,
    AlertNotFound: 404,
    ImageNotKept: 404,
    BodyTooLarge: 413,
    TimeoutMalformed: 400,
    QueueFull: 429,
    DecodeQueueFull: 429,
    BodiesFull: 429,
    AlertQueueFull: 429,
    AlertLogUnavailable: 503,
    AlertWriterStopped: 503,
    BatcherClosed: 503,
    ModelUnavailable: 503,
    DefenseFailed: 503,
    RequestTimedOut: 504,
}
"""The status of every error that a request may end in."""

RETRY_AFTER_SECONDS = 1


def create_app(settings: Settings) -> DirectApp:
    """Build the gateway for these settings; models are loaded when it starts."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(check_engine, settings)
        metrics = Metrics()
        log = await AlertLog.open(settings.database)
        vault = Vault(settings.inputs, settings.inputs_max_bytes, timedelta(days=settings.inputs_max_days))
        writer = AlertWriter(
            log,
            vault,
            settings.alert_queue,
            on_written=metrics.alerts_written.inc,
            on_error=lambda _: metrics.alert_write_failures.inc(),
        )
        metrics.alert_queue_depth.set_function(lambda: writer.depth)
        repository = Repository(settings, metrics)
        departures = Departures()
        decoder = Decoder(cores(), settings.queue_decodes)
        bodies = BodyBudget(settings.queue_bytes)
        app.state.gateway = Gateway(settings, metrics, repository, log, vault, writer, decoder, departures, bodies)
        watching = asyncio.create_task(departures.watch(), name="look after clients that leave")
        await writer.start()
        loading = asyncio.create_task(repository.load(), name="load the models")
        loading.add_done_callback(_report)
        try:
            yield
        finally:
            # The version that is being loaded is loaded to its end, in its thread, but not waited for.
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await repository.stop()
            decoder.close()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            try:
                await writer.stop(settings.shutdown_seconds)
            finally:
                await log.close()

    app = DirectApp(
        title="Portcullis",
        version=VERSION,
        description="An inference-time defense gateway for image classifiers.",
        lifespan=running,
        responses={status: {"model": ErrorBody} for status in (400, 403, 404, 413, 429, 503, 504)},
    )
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.include_router(open_inference.router)
    app.include_router(images.router)
    app.include_router(alerts.router)
    app.answer_directly("/v1/models/{model}/predict", images.predict)
    app.answer_directly("/v2/models/{model}/infer", open_inference.infer)
    app.answer_directly("/v2/models/{model}/versions/{version}/infer", open_inference.infer)

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics(request: Request) -> Response:
        """Return what Prometheus scrapes."""
        return Response(
            request.app.state.gateway.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    for error in STATUS:
        app.add_exception_handler(error, _refuse)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(RequestValidationError, _unprocessable)
    app.add_exception_handler(Exception, _unexpected)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    request.app.state.gateway.metrics.rejected.labels(type(error).__name__).inc()
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else None
    return _error(status, str(error), headers)


async def _framework_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{error.detail}: {request.method} {request.url.path}.", error.headers)


async def _unprocessable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
    return _error(422, f"{'; '.join(faults)}.")


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    logger.error("A request failed unexpectedly.", exc_info=error)
    return _error(500, "The gateway failed on this request; its log says more.")


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(ErrorBody(error=text).model_dump(), status, headers)


def _report(loading: asyncio.Task[None]) -> None:
    if not loading.cancelled() and (error := loading.exception()):
        logger.critical("The models could not be loaded.", exc_info=error)
