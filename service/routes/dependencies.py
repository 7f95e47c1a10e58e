"""What routes take from a request."""

import random
import reprlib
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Request

from service.gateway import Caller, Gateway
from service.oip import MOST_MICROSECONDS

TIMEOUT: Mapping[str, Any] = {
    "name": "timeout",
    "in": "query",
    "required": False,
    "description": "The microseconds that the request may take, then 504; 0 sets no bound but the gateway's own.",
    "schema": {"type": "integer", "minimum": 0, "default": 0},
}


class TimeoutMalformed(ValueError):
    """A request's timeout is no number of microseconds."""

    def __init__(self, given: str) -> None:
        super().__init__(
            f"The query parameter 'timeout' must be a whole number of microseconds from 0, not {reprlib.repr(given)}."
        )


def gateway_of(request: Request) -> Gateway:
    """Return the running gateway."""
    running: Gateway = request.app.state.gateway
    return running


def caller_of(request: Request) -> Caller:
    """Return who asks: ``X-Request-ID`` (or a fresh id), the client's address and connection."""
    request_id = request.headers.get("x-request-id", "")[:128] or _fresh_id()
    return Caller(request_id, request.client.host if request.client else "", request.receive)


def _fresh_id() -> str:
    # An id names a request in logs and is no secret: it is not worth a call of the system's random source.
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def timeout_of(request: Request) -> int:
    """Return the microseconds of the query parameter ``timeout``, 0 without; raises ``TimeoutMalformed``."""
    if not request.scope["query_string"]:
        return 0
    given = request.query_params.get("timeout", "0")
    if not (given.isascii() and given.isdecimal() and len(given) <= 20 and int(given) <= MOST_MICROSECONDS):
        raise TimeoutMalformed(given)
    return int(given)


GatewayOf = Annotated[Gateway, Depends(gateway_of)]
