"""The tables of what is watched. A change here comes with a migration; a test holds them together."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

metadata = MetaData()

events = Table(
    "events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, nullable=False, index=True),
    Column("at", Double, nullable=False, index=True),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("adapter", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("latency_ms", Double, nullable=False),
    Column("first_ms", Double),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("label", Text),
    Column("confidence", Double),
    Column("finish_reason", Text),
    Column("format_ok", Boolean),
    Column("input_chars", Integer),
    Column("output_chars", Integer),
    Column("subject", Text, index=True),
    Column("slices", Text, nullable=False),
    Column("messages", Text),
    Column("output", Text),
    Column("sketch", LargeBinary),
    Column("novelty", Double),
)

feedback = Table(
    "feedback",
    metadata,
    Column("event", Text, ForeignKey("events.id", ondelete="CASCADE"), primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("at", Double, nullable=False, index=True),
    Column("score", Double),
    Column("correction", Text),
    Column("comment", Text),
)

judgements = Table(
    "judgements",
    metadata,
    Column("event", Text, ForeignKey("events.id", ondelete="CASCADE"), primary_key=True),
    Column("judge", Text, primary_key=True),
    Column("at", Double, nullable=False),
    Column("score", Integer, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("flushed_at", Double, nullable=False),
    Column("closed_at", Double),
    Column("written", BigInteger, nullable=False),
    Column("joules", Double),
)

gaps = Table(
    "gaps",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("session", Text, nullable=False),
    Column("from_at", Double, nullable=False),
    Column("until_at", Double, nullable=False),
    Column("lost", Integer),
    Column("reason", Text, nullable=False),
)
"""Times of which events are missing; ``lost`` is null where nobody can know how many."""
