"""Blocking in an engine that schedules ahead: its tokens arrive after the next step has begun."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from guard.engine.stop import Stop, replace_sampled


class Ending(AsyncModelRunnerOutput):  # type: ignore[misc]
    """What was sampled, ended where it has to be when it arrives. The step that was scheduled meanwhile is dropped by
    the scheduler."""

    def __init__(self, inner: AsyncModelRunnerOutput, stops: Mapping[str, Stop]) -> None:
        self._inner, self._stops = inner, stops

    def get_output(self) -> ModelRunnerOutput:
        """Waits for the tokens."""
        output = self._inner.get_output()
        replace_sampled(output, self._stops)
        return output

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """What the KV connector said, where the tokens never arrive; vLLM asks from 0.33 on."""
        output: KVConnectorOutput | None = self._inner.get_kv_connector_output()
        return output
