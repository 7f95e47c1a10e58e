"""The alert log's tables, as the latest migration leaves them."""

from datetime import UTC, datetime

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Double, Index, Integer, MetaData, String, Table, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time, stored in UTC; SQLite has no time zones, so they are put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn an aware time into UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return an aware time in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

alerts = Table(
    "alerts",
    metadata,
    # In SQLite only a column declared INTEGER is the row's own number.
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("id", String(36), nullable=False, unique=True),
    Column("created", UtcDateTime, nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("request_id", Text, nullable=False, index=True),
    Column("index", Integer, nullable=False),
    Column("client", Text, nullable=False),
    Column("class_index", Integer, nullable=False),
    Column("label", Text, nullable=False),
    Column("undefended_class_index", Integer, nullable=True),
    Column("score", Double, nullable=False),
    Column("threshold", Double, nullable=False),
    Column("mode", String(16), nullable=False),
    Column("media_type", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("image_kept", Boolean, nullable=False),
    Column("status", Text, nullable=False),
    Column("p_value", Double, nullable=True),
    Index(None, "model", "seq"),
    Index(None, "label", "seq"),
    Index(None, "client", "seq"),
    Index(None, "status", "seq"),
)

# One row: the last `seq` given out. A writer updates it first, which makes every other writer wait until it commits;
# so a lower `seq` is never committed after a higher one, whatever the database and however many services share it.
alert_seq = Table("alert_seq", metadata, Column("last", BigInteger, nullable=False))
