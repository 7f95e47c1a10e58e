"""The alert log: alerts in a database, written in order, read newest first."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from alembic.util import CommandError
from sqlalchemy import ColumnElement, Row, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.alerts.database import build_engine, upgrade_schema
from service.alerts.errors import AlertLogUnavailable, AlertNotFound, PageInvalid
from service.alerts.models import Alert, AlertFilter, AlertPage
from service.alerts.table import alert_seq, alerts

# A statement takes at most 32766 parameters in SQLite, 32767 in PostgreSQL.
_IDS_PER_LOOKUP = 1000


class AlertLog:
    """The alerts in a database, SQLite (`sqlite+aiosqlite://`) or PostgreSQL (`postgresql+asyncpg://`).

    Every method raises AlertLogUnavailable when the database does not answer or refuses.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, database_url: str) -> Self:
        """Open the log, after bringing the database's tables up to date in a thread.

        Creates the file and the folder of an SQLite database. Raises DatabaseUnsuitable, AlertLogUnavailable.
        """
        with _reachable("opened"):
            await asyncio.to_thread(upgrade_schema, database_url)
        return cls(build_engine(database_url))

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def add(self, batch: Sequence[Alert]) -> None:
        """Write alerts in the order given, all or none. Alerts whose id is in the log already are left as they are."""
        fresh = {alert.id: alert for alert in batch}
        if not fresh:
            return
        with _reachable("written"):
            async with self._engine.begin() as connection:
                # First of all, since this is what other writers wait on; see `alert_seq`.
                advance = update(alert_seq).values(last=alert_seq.c.last + len(fresh)).returning(alert_seq.c.last)
                last = (await connection.execute(advance)).scalar_one()
                known = await _known_ids(connection, list(fresh))
                rows = [
                    {**alert.model_dump(), "seq": seq}
                    for seq, alert in enumerate(fresh.values(), last - len(fresh) + 1)
                    if alert.id not in known
                ]
                if rows:
                    await connection.execute(insert(alerts), rows)

    async def get(self, alert_id: str) -> Alert:
        """Return the alert with this id. Raises AlertNotFound."""
        with _reachable("read"):
            async with self._engine.connect() as connection:
                row = (await connection.execute(select(alerts).where(alerts.c.id == alert_id))).one_or_none()
        if row is None:
            raise AlertNotFound(alert_id)
        return _alert(row)

    async def page(self, filters: AlertFilter, after: int | None, limit: int) -> AlertPage:
        """Return up to `limit` alerts that match, newest first.

        `after` is the `next_cursor` of the page before, None for the first page. Following the cursors meets every
        alert that matched when the first page was read exactly once, whatever is written meanwhile. Raises PageInvalid.
        """
        if not 1 <= limit < 2**63 - 1:
            raise PageInvalid("a size", limit, lowest=1)
        query = select(alerts).where(*_conditions(filters)).order_by(alerts.c.seq.desc()).limit(limit + 1)
        if after is not None:
            if not 0 <= after < 2**63:
                raise PageInvalid("a cursor", after, lowest=0)
            query = query.where(alerts.c.seq < after)
        with _reachable("read"):
            async with self._engine.connect() as connection:
                rows = (await connection.execute(query)).all()
        found = tuple(_alert(row) for row in rows[:limit])
        return AlertPage(alerts=found, next_cursor=found[-1].seq if len(rows) > limit else None)

    async def count(self, filters: AlertFilter) -> int:
        """Return how many alerts match."""
        query = select(func.count()).select_from(alerts).where(*_conditions(filters))
        with _reachable("read"):
            async with self._engine.connect() as connection:
                return (await connection.execute(query)).scalar_one()


@contextmanager
def _reachable(action: str) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, CommandError, OSError) as error:
        # The first line says what happened; the rest is the statement with its values, which are not for everyone.
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise AlertLogUnavailable(action, reason) from error


async def _known_ids(connection: AsyncConnection, ids: Sequence[str]) -> set[str]:
    known: set[str] = set()
    for start in range(0, len(ids), _IDS_PER_LOOKUP):
        lookup = select(alerts.c.id).where(alerts.c.id.in_(ids[start : start + _IDS_PER_LOOKUP]))
        known.update((await connection.execute(lookup)).scalars())
    return known


def _alert(row: Row[tuple[object, ...]]) -> Alert:
    return Alert.model_validate(row._asdict())


def _conditions(filters: AlertFilter) -> list[ColumnElement[bool]]:
    exact = ("model", "version", "label", "client", "request_id", "status")
    conditions = [alerts.c[name] == value for name in exact if (value := getattr(filters, name)) is not None]
    if filters.since is not None:
        conditions.append(alerts.c.created >= filters.since)
    if filters.until is not None:
        conditions.append(alerts.c.created < filters.until)
    if filters.minimum_score is not None:
        conditions.append(alerts.c.score >= filters.minimum_score)
    if filters.maximum_p_value is not None:
        conditions.append(alerts.c.p_value <= filters.maximum_p_value)
    return conditions
