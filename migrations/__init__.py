"""The Alembic migrations, for SQLite and PostgreSQL."""
