"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("latency_ms", sa.Double, nullable=False),
        sa.Column("first_ms", sa.Double),
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("completion_tokens", sa.Integer),
        sa.Column("label", sa.Text),
        sa.Column("confidence", sa.Double),
        sa.Column("finish_reason", sa.Text),
        sa.Column("format_ok", sa.Boolean),
        sa.Column("input_chars", sa.Integer),
        sa.Column("output_chars", sa.Integer),
        sa.Column("subject", sa.Text),
        sa.Column("slices", sa.Text, nullable=False),
        sa.Column("messages", sa.Text),
        sa.Column("output", sa.Text),
        sa.Column("sketch", sa.LargeBinary),
        sa.Column("novelty", sa.Double),
    )
    for column in ("request_id", "at", "subject"):
        op.create_index(f"ix_events_{column}", "events", [column])
    event = sa.Column("event", sa.Text, sa.ForeignKey("events.id", ondelete="CASCADE"), primary_key=True)
    op.create_table(
        "feedback",
        event,
        sa.Column("subject", sa.Text, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("score", sa.Double),
        sa.Column("correction", sa.Text),
        sa.Column("comment", sa.Text),
    )
    op.create_index("ix_feedback_at", "feedback", ["at"])
    op.create_table(
        "judgements",
        sa.Column("event", sa.Text, sa.ForeignKey("events.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("judge", sa.Text, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("score", sa.Integer, nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("flushed_at", sa.Double, nullable=False),
        sa.Column("closed_at", sa.Double),
        sa.Column("written", sa.BigInteger, nullable=False),
        sa.Column("joules", sa.Double),
    )
    op.create_table(
        "gaps",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("session", sa.Text, nullable=False),
        sa.Column("from_at", sa.Double, nullable=False),
        sa.Column("until_at", sa.Double, nullable=False),
        sa.Column("lost", sa.Integer),
        sa.Column("reason", sa.Text, nullable=False),
    )


def downgrade() -> None:
    for table in ("gaps", "sessions", "judgements", "feedback", "events"):
        op.drop_table(table)
