"""An application that answers some of its routes without the framework's own steps."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

Endpoint = Callable[..., Awaitable[Response]]
"""What answers a request: called with it and the parameters of its path."""


@dataclass(frozen=True)
class _Direct:
    path: str
    pattern: re.Pattern[str]
    endpoint: Endpoint


class DirectApp(FastAPI):
    """A FastAPI application in which a POST to certain paths goes straight to its endpoint.

    Middleware, routing and the solving of dependencies cost several times what the answer of a small image does. The
    endpoints are routes of the application like any others, so that they are described; errors find the application's
    own exception handlers.
    """

    _paths: tuple[_Direct, ...] = ()

    def answer_directly(self, path: str, endpoint: Endpoint) -> None:
        """Send a POST to a path to its endpoint."""
        self._paths = (*self._paths, _Direct(path, compile_path(path)[0], endpoint))

    @property
    def direct_paths(self) -> list[str]:
        """The paths to which a POST goes straight to its endpoint."""
        return [direct.path for direct in self._paths]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            for direct in self._paths:
                if found := direct.pattern.match(scope["path"]):
                    scope["app"] = self
                    request = Request(scope, receive, send)
                    response = await self._response(request, direct.endpoint, found.groupdict())
                    await response(scope, receive, send)
                    return
        await super().__call__(scope, receive, send)

    async def _response(self, request: Request, endpoint: Endpoint, parameters: dict[str, str]) -> Response:
        try:
            return await endpoint(request, **parameters)
        except Exception as error:
            handlers = (self.exception_handlers.get(kind) for kind in type(error).__mro__)
            handler = next((handler for handler in handlers if handler is not None), None)
            if handler is None:
                raise
            answer: Response | Awaitable[Response] = handler(request, error)
            return answer if isinstance(answer, Response) else await answer
