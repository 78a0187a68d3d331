"""vLLM's scheduler, but for one thing: a sequence that has ended is over, whatever its grammar says. Give it to vLLM as
`--scheduler-cls guard.engine.scheduler.scheduler`.

A blocked sequence ends with a token that no grammar expects in the middle of its output. vLLM 0.32 sees the stop, then
asks the grammar about the token, and makes an internal error of its no: the client of the engine gets 500, and with the
blocked sequence every other one of its request is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager


def scheduler(*, vllm_config: VllmConfig, structured_output_manager: StructuredOutputManager, **more: Any) -> Scheduler:
    """The scheduler that vLLM would take, with grammars that are not asked about ended sequences."""
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    grammars: Any = Grammars(structured_output_manager)
    return kind(vllm_config=vllm_config, structured_output_manager=grammars, **more)


class Grammars:
    """vLLM's manager of structured output, as the scheduler sees it."""

    def __init__(self, manager: StructuredOutputManager) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def accept_tokens(self, request: Request, new_token_ids: list[int]) -> bool:
        """Whether the grammar of a request takes these tokens. One that has stopped needs no grammar any more; one that
        will be resumed does."""
        if request.status == RequestStatus.FINISHED_STOPPED and not request.resumable:
            return True
        return bool(self._manager.accept_tokens(request, new_token_ids))
