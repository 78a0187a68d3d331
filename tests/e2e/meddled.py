"""The guard's worker, with a way to spoil one rank of a tensor-parallel engine."""

from __future__ import annotations

from typing import Any
from unittest import mock

from vllm.distributed import get_tp_group

from guard.engine.ledger import Ledger, Limit
from guard.engine.ranks import check, exchange
from guard.engine.worker import GuardWorker
from guard.errors import EngineError

SPOILED = 1
"""The rank."""


class MeddledWorker(GuardWorker):
    """Give it to vLLM as `--worker-cls tests.e2e.meddled.MeddledWorker`."""

    def block_everything(self) -> None:
        """From now on, on the spoiled rank."""
        if self.rank != SPOILED:
            return
        limits = Ledger._limits

        def lowest(this: Ledger, policy: Any) -> Any:
            return {key: Limit(-1e9, limit.ranks) for key, limit in limits(this, policy).items()}

        mock.patch.object(Ledger, "_limits", lowest).start()
        for ledger in self._guards.ledgers():
            ledger._compile.cache_clear()

    def lose_a_hook(self) -> None:
        """As if its graph had never had it."""
        if self.rank == SPOILED:
            self._lost = dict(self._hooks())
            self._hooks().clear()

    def find_the_hook(self) -> None:
        """It is back."""
        if self.rank == SPOILED:
            self._hooks().update(self._lost)

    def keep_a_sum(self) -> None:
        """On every rank, one matrix keeps its part of the sum to itself."""
        self._runner.model.get_submodule("model.layers.2.mlp.down_proj").reduce_results = False

    def compare(self) -> str:
        """What is done at start."""
        try:
            return str(check(exchange(self._sight(3), get_tp_group().cpu_group)))
        except EngineError as error:
            return str(error)

    def _hooks(self) -> dict[int, Any]:
        hooks: dict[int, Any] = self._runner.model.get_submodule("model.layers.1")._forward_hooks
        return hooks


class HalfHookedWorker(MeddledWorker):
    """Has lost it before it starts."""

    def load_model(self, **keywords: Any) -> None:
        super().load_model(**keywords)
        self.lose_a_hook()
