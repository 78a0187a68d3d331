"""Incidents in a database. Blocking: threads call it, the event loop never.

store.add([incident]);  store.page(Filter(action="block"), limit=50);  store.label(id, "false", by="ada", note="")
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from guard.errors import InputError
from server.incidents.database import Database
from server.incidents.incident import Incident, Label, Reviewed
from server.incidents.tables import INCIDENTS, LABELLED

_EXACT = ("model", "tenant", "key", "policy", "action", "mode", "phase", "detector", "layer", "direction", "endpoint")
_DELETED_AT_ONCE = 1000
_REVIEW = ("label", "labelled_by", "labelled_at", "note")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which incidents. None: any."""

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    tenant: str | None = None
    key: str | None = None
    policy: str | None = None
    action: str | None = None
    mode: str | None = None
    phase: str | None = None
    detector: str | None = None
    layer: int | None = None
    direction: str | None = None
    endpoint: str | None = None
    label: Label | str | None = None
    """Or `none`: those that nobody has labelled."""
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some incidents, newest first."""

    incidents: tuple[Reviewed, ...]
    after: str | None
    """Where the next page begins; None at the end."""


class Store:
    """Reads and writes. Every method raises SQLAlchemyError where the database cannot answer."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine
        self._insert = sqlite.insert if database.sqlite else postgresql.insert

    def add(self, incidents: Sequence[Incident]) -> int:
        """Keep them; returns how many were new. One that is there already stays as it is."""
        if not incidents:
            return 0
        once = {incident.id: incident for incident in incidents}
        statement = self._insert(INCIDENTS).on_conflict_do_nothing(index_elements=["id"]).returning(INCIDENTS.c.id)
        with self._engine.begin() as connection:
            return len(connection.execute(statement, [_columns(incident) for incident in once.values()]).all())

    def get(self, identity: str) -> Reviewed | None:
        """One of them."""
        with self._engine.connect() as connection:
            row = connection.execute(select(INCIDENTS).where(INCIDENTS.c.id == identity)).one_or_none()
        return None if row is None else _reviewed(row)

    def history(self, identity: str) -> list[dict[str, Any]]:
        """Everything that was said about one, oldest first."""
        columns = LABELLED.c
        query = select(columns.label, columns.by, columns.at, columns.note).where(columns.incident_id == identity)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(columns.id)).all()
        return [{"label": row.label, "by": row.by, "at": _aware(row.at), "note": row.note} for row in rows]

    def page(self, wanted: Filter, limit: int, after: str | None = None) -> Page:
        """Newest first. Raises InputError where `after` is not what an earlier page said."""
        query = select(INCIDENTS).where(*_conditions(wanted))
        if after is not None:
            at, identity = _place(after)
            columns = INCIDENTS.c
            query = query.where(or_(columns.at < at, and_(columns.at == at, columns.id < identity)))
        query = query.order_by(INCIDENTS.c.at.desc(), INCIDENTS.c.id.desc()).limit(limit + 1)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        found = tuple(_reviewed(row) for row in rows[:limit])
        more = len(rows) > limit
        return Page(found, _mark(found[-1].incident) if more else None)

    def all(self, wanted: Filter, chunk: int = 500) -> Iterator[Reviewed]:
        """Every one, newest first, some at a time."""
        after: str | None = None
        while True:
            page = self.page(wanted, chunk, after)
            yield from page.incidents
            if page.after is None:
                return
            after = page.after

    def label(self, identity: str, label: Label, by: str, note: str, at: datetime | None = None) -> Reviewed | None:
        """Say what an incident was; the last word holds, and all are kept. None where there is no such incident."""
        at = at or datetime.now(UTC)
        with self._engine.begin() as connection:
            changed = connection.execute(
                update(INCIDENTS)
                .where(INCIDENTS.c.id == identity)
                .values(label=label, labelled_by=by, labelled_at=at, note=note)
            )
            if changed.rowcount == 0:
                return None
            connection.execute(insert(LABELLED).values(incident_id=identity, label=label, by=by, at=at, note=note))
        return self.get(identity)

    def labels(self) -> dict[str, int]:
        """How many incidents have each label now; `none` for those without."""
        query = select(INCIDENTS.c.label, func.count()).group_by(INCIDENTS.c.label)
        with self._engine.connect() as connection:
            return {label or "none": count for label, count in connection.execute(query).all()}

    def prune(self, days: float | None, rows: int | None, now: datetime | None = None) -> int:
        """Delete what is too old or too much, at most a thousand; returns how many."""
        columns = INCIDENTS.c
        oldest = select(columns.id).order_by(columns.at, columns.id)
        with self._engine.begin() as connection:
            doomed: list[str] = []
            if days is not None:
                before = (now or datetime.now(UTC)) - timedelta(days=days)
                query = oldest.where(columns.at < before).limit(_DELETED_AT_ONCE)
                doomed = list(connection.execute(query).scalars())
            if not doomed and rows is not None:
                total = connection.execute(select(func.count()).select_from(INCIDENTS)).scalar_one()
                if total > rows:
                    doomed = list(connection.execute(oldest.limit(min(total - rows, _DELETED_AT_ONCE))).scalars())
            if doomed:
                connection.execute(delete(LABELLED).where(LABELLED.c.incident_id.in_(doomed)))
                connection.execute(delete(INCIDENTS).where(columns.id.in_(doomed)))
        return len(doomed)


def _conditions(wanted: Filter) -> list[ColumnElement[bool]]:
    columns = INCIDENTS.c
    conditions = [columns[name] == getattr(wanted, name) for name in _EXACT if getattr(wanted, name) is not None]
    if wanted.since is not None:
        conditions.append(columns.at >= wanted.since.astimezone(UTC))
    if wanted.until is not None:
        conditions.append(columns.at < wanted.until.astimezone(UTC))
    if wanted.label is not None:
        conditions.append(columns.label.is_(None) if wanted.label == "none" else columns.label == wanted.label)
    if wanted.request_id is not None:
        conditions.append(columns.request_id == wanted.request_id)
    return conditions


def _columns(incident: Incident) -> dict[str, Any]:
    return {
        **incident.model_dump(exclude={"sequences"}),
        "at": incident.at.astimezone(UTC),
        "sequences": json.dumps(incident.model_dump(mode="json", include={"sequences"})["sequences"]),
    }


def _reviewed(row: Row[Any]) -> Reviewed:
    fields = dict(row._mapping)
    review = {name: fields.pop(name) for name in _REVIEW}
    fields["at"] = _aware(fields["at"])
    fields["sequences"] = json.loads(fields["sequences"])
    review["labelled_at"] = _aware(review["labelled_at"])
    return Reviewed(incident=Incident.model_validate(fields), **review)


def _aware(at: datetime | None) -> datetime | None:
    """SQLite keeps no zone: everything in it is UTC."""
    return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)


def _mark(incident: Incident) -> str:
    text = f"{incident.at.astimezone(UTC).isoformat()} {incident.id}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def _place(mark: str) -> tuple[datetime, str]:
    try:
        at, identity = base64.urlsafe_b64decode(mark.encode()).decode().split(" ")
        return datetime.fromisoformat(at).astimezone(UTC), identity
    except (binascii.Error, ValueError) as error:
        raise InputError("`after` is not a place that an earlier page named") from error
