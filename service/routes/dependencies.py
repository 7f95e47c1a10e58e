"""What routes take from a request."""

import uuid
from typing import Annotated

from fastapi import Depends, Request

from service.gateway import Caller, Gateway


def gateway(request: Request) -> Gateway:
    """Return the running gateway."""
    running: Gateway = request.app.state.gateway
    return running


def caller(request: Request) -> Caller:
    """Return who asks: ``X-Request-ID`` (or a fresh id) and the client's address."""
    request_id = request.headers.get("x-request-id", "")[:128] or str(uuid.uuid4())
    return Caller(request_id, request.client.host if request.client else "")


GatewayOf = Annotated[Gateway, Depends(gateway)]
CallerOf = Annotated[Caller, Depends(caller)]
