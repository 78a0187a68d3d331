"""The two tables. `migrations/` makes them; a test holds both to each other."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

METADATA = MetaData()

INCIDENTS = Table(
    "incidents",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("model", String(128), nullable=False),
    Column("engine", String(64)),
    Column("tenant", String(64)),
    Column("key", String(12)),
    Column("policy", String(64), nullable=False),
    Column("mode", String(16), nullable=False),
    Column("action", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("phase", String(16)),
    Column("detector", String(32)),
    Column("score", Float),
    Column("threshold", Float),
    Column("p_value", Float),
    Column("position", Integer),
    Column("layer", Integer),
    Column("direction", String(128)),
    Column("stream", Boolean, nullable=False),
    Column("bank", String(128), nullable=False),
    Column("calibration", String(128), nullable=False),
    Column("content_kind", String(16), nullable=False),
    Column("content", Text),
    Column("sequences", Text, nullable=False),
    Column("label", String(8)),
    Column("labelled_by", String(128)),
    Column("labelled_at", DateTime(timezone=True)),
    Column("note", Text),
    Index("incidents_at", "at", "id"),
    Index("incidents_model", "model", "at"),
    Index("incidents_tenant", "tenant", "at"),
    Index("incidents_label", "label", "at"),
)
"""One row per request; `label` and what follows are the last word of `LABELS`."""

LABELLED = Table(
    "labels",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("incident_id", String(32), ForeignKey("incidents.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("label", String(8), nullable=False),
    Column("by", String(128), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("note", Text, nullable=False),
)
"""Everything that was ever said about an incident."""
