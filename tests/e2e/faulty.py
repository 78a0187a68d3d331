"""A worker with faults to switch on, as `--worker-cls tests.e2e.faulty.FaultyWorker`: a file says which one it has now.

The smallest thing is broken each time, where it would break: a hook, a layer, the memory of scores, the channel, the
process.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from guard.engine.probe import decoder_layers
from guard.engine.worker import GuardWorker
from tests.e2e.child import FAULT_FILE

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

LAYER = 2


class FaultyWorker(GuardWorker):
    """Looks into the file before every step."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        fault = Path(os.environ[FAULT_FILE]).read_text().strip()
        undo = self._break(fault, scheduler_output)
        try:
            return super().execute_model(scheduler_output)
        finally:
            undo()

    def _break(self, fault: str, step: SchedulerOutput) -> Any:
        layer: Any = decoder_layers(self._runner.model, self._guards.bank)[LAYER]
        decodes = not step.scheduled_new_reqs and step.total_num_scheduled_tokens == 1
        if fault == "hook" or (fault == "hook in the answer" and decodes):
            hooks = dict(layer._forward_hooks)
            layer._forward_hooks.clear()
            return lambda: layer._forward_hooks.update(hooks)
        if fault == "twice":
            handle: RemovableHandle = layer.register_forward_hook(next(iter(layer._forward_hooks.values())))
            return handle.remove
        if fault == "nan":
            # Before the probe's own hook, so that the probe sees what the next layer will.
            handle = layer.register_forward_hook(_not_finite, prepend=True)
            return handle.remove
        if fault == "forgotten":
            self._guards.forget()
        if fault == "channel" and self._channel is not None:
            self._channel.close()
        if fault == "killed in the answer" and decodes:
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda: None


def _not_finite(
    _layer: object, _arguments: object, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return output[0] * torch.nan, output[1]
