"""Whether the weights that vLLM holds for an adapter are those that the adapter's bank was built from.

vLLM reads an adapter's folder when it is asked to load it, when a request needs one that was dropped for want of room,
and when it is told to load again in place; the folder may have changed in between. So the folder is read and digested
before a load that somebody asked for, which is then refused, and again whenever vLLM holds other objects than those
that were last found right.

vLLM's CPU build computes requests without an adapter with whatever lies in the last slot for adapters, where its CUDA
kernels skip them (vllm-project/vllm#48421). An empty slot does no harm; one that was ever filled keeps its weights when
the adapter is dropped.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vllm.platforms import current_platform

from guard.adapters import Adapter
from guard.checkpoints import Checkpoint
from guard.errors import BankError, InputError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

SHOWN = 80
"""Characters of an adapter's name in messages."""


class Slots(Protocol):
    """Where vLLM holds adapters: the part of `RunnerV1` that is asked here."""

    def adapter(self, number: int) -> object | None:
        """What holds the weights of an adapter; None where there are none."""

    def last_slot_taken(self) -> bool:
        """Whether an adapter lies in the last slot."""


Identity = tuple[int, str, str]
"""Number, name and path of an adapter. vLLM holds weights by number, and asks nobody whether numbers are distinct."""


def identity(request: LoRARequest) -> Identity:
    """Of the adapter that a request uses."""
    return request.lora_int_id, request.lora_name, request.lora_path


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found of weights when vLLM first held them."""

    weights: weakref.ref[object]
    identity: Identity
    """With which they were loaded."""
    problem: str | None


class HeldAdapters:
    """The adapters that vLLM holds, and what is wrong with them."""

    def __init__(self, base: Checkpoint, base_digest: str, tuned_digests: Mapping[str, str]) -> None:
        """`tuned_digests`: of every adapter's bank, by the adapter's name."""
        self._base = base
        self._base_digest = base_digest
        self._expected = tuned_digests
        self._found: dict[int, _Found] = {}
        self._last_slot_filled = False

    def check(self, request: LoRARequest) -> None:
        """Raise BankError unless the adapter's folder holds what its bank was built from; CheckpointError or
        UnsupportedModelError where that cannot be said. An adapter without a bank is not looked at."""
        if request.lora_name not in self._expected:
            return
        # What is no folder here vLLM would download: such an adapter is refused as one whose folder is missing.
        adapter = Adapter.open(Path(request.lora_path).expanduser(), self._base)
        found, expected = adapter.digest_on(self._base_digest), self._expected[request.lora_name]
        if found != expected:
            raise BankError(
                f"{adapter.path}: the bank of adapter {shown(request.lora_name)} is for other weights: it was built "
                f"for {expected}, the adapter on this base has {found}"
            )

    def look(self, requests: Collection[LoRARequest], slots: Slots) -> dict[Identity, str]:
        """What is wrong with the adapters that were just loaded, or used by a forward pass; to be called after each."""
        self._last_slot_filled |= current_platform.is_cpu() and slots.last_slot_taken()
        wrong: dict[Identity, str] = {}
        numbers = Counter(number for number, _, _ in {identity(request) for request in requests})
        for request in requests:
            one = identity(request)
            problem = self._problem(request, slots.adapter(request.lora_int_id))
            if numbers[request.lora_int_id] > 1:
                problem = f"adapter {shown(request.lora_name)} shares its number with another"
            if problem is not None:
                wrong[one] = problem
        return wrong

    def base_problem(self) -> str | None:
        """Why what a forward pass computed for requests without an adapter cannot be judged; None where it can."""
        if not self._last_slot_filled:
            return None
        return (
            "an adapter was loaded into the last slot, with which vLLM's CPU build computes requests that use none: "
            "restart with a larger --max-loras"
        )

    def _problem(self, request: LoRARequest, weights: object | None) -> str | None:
        name = shown(request.lora_name)
        if weights is None:
            return f"vLLM holds no weights of adapter {name}"
        known = self._found.get(request.lora_int_id)
        if known is None or known.weights() is not weights:
            known = _Found(weakref.ref(weights), identity(request), self._mismatch(request))
            self._found[request.lora_int_id] = known
        if known.identity != identity(request):
            return f"vLLM holds the weights of another adapter under the number of adapter {name}"
        return known.problem

    def _mismatch(self, request: LoRARequest) -> str | None:
        if request.lora_name not in self._expected:
            return f"adapter {shown(request.lora_name)} has no bank here"
        try:
            self.check(request)
        except InputError as error:
            return str(error)
        return None


def shown(name: str) -> str:
    """An adapter's name, as a message may show it."""
    return f"`{name[:SHOWN]}`" if name.isprintable() else ascii(name[:SHOWN])
