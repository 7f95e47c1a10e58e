"""Running the gateway until it is told to stop."""

import uvicorn

from service.app import create_app
from service.settings import Settings


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted."""
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        workers=1,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
