"""Alerts, for operators."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse

from service.routes.dependencies import GatewayOf
from service.schemas import AlertQuery, AlertRow, AlertRows
from service.settings import is_within


class OperatorsOnly(PermissionError):
    """A client outside the operators' networks asked for alerts."""

    def __init__(self, client: str) -> None:
        self.client = client
        super().__init__(f"Alerts are for operators only, and {client or 'this client'} is not in their networks.")


def operators_only(request: Request, gateway: GatewayOf) -> None:
    """Let only clients in the operators' networks pass; raises ``OperatorsOnly``."""
    client = request.client.host if request.client else ""
    if not is_within(client, gateway.settings.operators):
        raise OperatorsOnly(client)


router = APIRouter(prefix="/v1/alerts", tags=["alerts"], dependencies=[Depends(operators_only)])


@router.get("")
async def alerts(gateway: GatewayOf, query: Annotated[AlertQuery, Query()]) -> AlertRows:
    """List alerts, newest first."""
    page = await gateway.log.page(query, query.after, query.limit)
    return AlertRows(
        alerts=[AlertRow.model_validate(alert, from_attributes=True) for alert in page.alerts], next=page.next_cursor
    )


@router.get("/{id}")
async def alert(gateway: GatewayOf, id: str) -> AlertRow:
    """Show one alert."""
    return AlertRow.model_validate(await gateway.log.get(id), from_attributes=True)


@router.get("/{id}/image", response_class=FileResponse)
async def alert_image(gateway: GatewayOf, id: str) -> FileResponse:
    """Return the alerted input exactly as it was received: the image's bytes, or .npy for a tensor."""
    found = await gateway.log.get(id)
    path = gateway.vault.path(found.id, found.created, found.media_type)
    return FileResponse(path, media_type=found.media_type, filename=path.name)
