"""The history of the alert log's tables, run by Alembic."""
