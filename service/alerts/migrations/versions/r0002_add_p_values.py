"""Give every alert room for the p-value of its score; those on record have none."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("alerts", sa.Column("p_value", sa.Double(), nullable=True))


def downgrade() -> None:
    """Remove the column, with what is in it."""
    op.drop_column("alerts", "p_value")
