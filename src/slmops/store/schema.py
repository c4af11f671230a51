"""The index's tables. A change here comes with a migration in ``migrations/versions``; a test holds them together."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, MetaData, Table, Text

metadata = MetaData()

artifacts = Table(
    "artifacts",
    metadata,
    Column("path", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False, index=True),
    Column("key", Text, nullable=False, index=True),
    Column("created_at", Text, nullable=False),
    Column("wall_s", Float, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)

inputs = Table(
    "inputs",
    metadata,
    Column("path", Text, ForeignKey("artifacts.path", ondelete="CASCADE"), primary_key=True),
    Column("role", Text, primary_key=True),
    Column("digest", Text, nullable=False, index=True),
    Column("key", Text, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False),
    Column("started_at", Text, nullable=False),
    Column("finished_at", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("report_digest", Text, nullable=True),
)
