"""From a request that ended to an incident that is kept, if it is one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from server.access.limiter import Client
from server.assessment import Assessor
from server.incidents.content import kept
from server.incidents.incident import Who, incident_of, plain
from server.incidents.recorder import Recorder
from server.incidents.webhooks import Webhooks
from server.protocols.openai import Call


@dataclass(frozen=True, slots=True)
class Incidents:
    """Where exchanges report to."""

    recorder: Recorder | None = None
    webhooks: Webhooks | None = None

    def identity(self) -> str | None:
        """The id of one that a request may become; None where none are kept."""
        heard = self.webhooks is not None and self.webhooks.wanted
        return uuid4().hex if heard or self.recorder is not None else None

    def keep(
        self,
        call: Call,
        assessor: Assessor,
        client: Client,
        request_id: str,
        engine: str | None,
        hash_key: bytes | None,
    ) -> None:
        """Record the request, once, where a sequence of it was not simply allowed."""
        identity = assessor.incident
        if identity is None:
            return
        ruling = assessor.ruling
        who = Who(
            id=identity,
            at=datetime.now(UTC),
            request_id=request_id,
            endpoint=call.endpoint.name,
            model=plain(call.model),
            engine=engine,
            tenant=client.tenant,
            key=client.key,
            policy=ruling.name,
            mode=ruling.mode,
            stream=call.stream,
        )
        content = kept(call.fields, ruling.content, hash_key)
        incident = incident_of(who, assessor.records, assessor.guard, content)
        if incident is None:
            return
        if self.recorder is not None:
            self.recorder.record(incident)
        if self.webhooks is not None:
            self.webhooks.offer(incident)
