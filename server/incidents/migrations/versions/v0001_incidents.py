"""Incidents and their labels."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "incidents",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("engine", sa.String(64)),
        sa.Column("tenant", sa.String(64)),
        sa.Column("key", sa.String(12)),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("phase", sa.String(16)),
        sa.Column("detector", sa.String(32)),
        sa.Column("score", sa.Float),
        sa.Column("threshold", sa.Float),
        sa.Column("p_value", sa.Float),
        sa.Column("position", sa.Integer),
        sa.Column("layer", sa.Integer),
        sa.Column("direction", sa.String(128)),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("bank", sa.String(128), nullable=False),
        sa.Column("calibration", sa.String(128), nullable=False),
        sa.Column("content_kind", sa.String(16), nullable=False),
        sa.Column("content", sa.Text),
        sa.Column("sequences", sa.Text, nullable=False),
        sa.Column("label", sa.String(8)),
        sa.Column("labelled_by", sa.String(128)),
        sa.Column("labelled_at", sa.DateTime(timezone=True)),
        sa.Column("note", sa.Text),
    )
    op.create_index("incidents_at", "incidents", ["at", "id"])
    op.create_index("incidents_model", "incidents", ["model", "at"])
    op.create_index("incidents_tenant", "incidents", ["tenant", "at"])
    op.create_index("incidents_label", "incidents", ["label", "at"])
    op.create_table(
        "labels",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column(
            "incident_id", sa.String(32), sa.ForeignKey("incidents.id", ondelete="CASCADE"), nullable=False, index=True
        ),
        sa.Column("label", sa.String(8), nullable=False),
        sa.Column("by", sa.String(128), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
    )


def downgrade() -> None:
    """Incidents are evidence: a step back would lose them."""
    raise NotImplementedError("there is no way back from the first step but to delete the database")
