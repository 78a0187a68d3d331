"""The guards of one engine: one for the base model, and one for every adapter that has a bank.

All banks are read by one set of probes, at every row; each guard judges the rows of its own requests, with its own
calibration and its own scores of what is in the KV cache. Blocks of the cache are never shared between adapters: vLLM
hashes an adapter's name and path into them.

A request of which no guard knows is unscorable: an adapter without a bank or with other weights, or the base model
where only adapters have banks. In `enforce` it does not pass, and the reason names the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from guard.bank import Bank
from guard.calibration import Calibration
from guard.checkpoints import Checkpoint
from guard.engine.adapters import HeldAdapters, Slots, identity, shown
from guard.engine.banks import Place, load_bank, together
from guard.engine.judge import Judge, Pass
from guard.engine.ledger import Ledger
from guard.engine.readings import Readings
from guard.engine.settings import BASE, BankFiles
from guard.engine.shadow import Shadow
from guard.engine.stop import Endings, Stop
from guard.errors import ConfigError
from guard.evidence import Evidence, Record
from guard.faults import Fault
from guard.scores import BankSpace

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from guard.engine.runner import Rows

Where = Callable[[str, int, int], torch.Tensor]


@dataclass(slots=True)
class Guard:
    """What judges the requests of one model: the base, or the base with one adapter."""

    name: str
    """The adapter's; BASE for the base model."""
    bank: Bank
    space: BankSpace
    place: Place
    """Of its bank among all."""
    judge: Judge | None = None
    """None until a calibration is loaded."""
    shadow: Shadow | None = None
    """None where nothing is taken from a cache."""

    def take(self, judge: Judge) -> None:
        """Judge by another calibration from now on."""
        if self.judge is not None:
            judge.ledger.adopt(self.judge.ledger)
        if self.shadow is not None:
            self.shadow.forget()
        self.judge = judge

    @property
    def model(self) -> str:
        """Of what, for a message."""
        return "the base model" if self.name == BASE else f"adapter {shown(self.name)}"


@dataclass(frozen=True, slots=True)
class Share:
    """What of a forward pass concerns one guard."""

    guard: Guard
    batch: tuple[Rows, ...]
    readings: Readings


@dataclass(frozen=True, slots=True)
class Dealt:
    """One forward pass, dealt to the guards whose requests it computed."""

    batch: tuple[Rows, ...]
    shares: tuple[Share, ...]
    unguarded: Mapping[str, str]
    """Sequences that nobody can judge, and why."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The same, with every token scored."""

    batch: tuple[Rows, ...]
    passes: tuple[tuple[Guard, Pass], ...]
    unguarded: Mapping[str, str]


class Guards:
    """Every guard of one engine. `bank` holds the directions of all, for the probes."""

    def __init__(self, banks: Mapping[str, Bank], held: HeldAdapters) -> None:
        """`banks`: by adapter, BASE for the base model's own."""
        self.bank, places = together(list(banks.values()))
        self._all = tuple(
            Guard(name, bank, BankSpace.of(bank), place)
            for (name, bank), place in zip(banks.items(), places, strict=True)
        )
        self._by_name = {guard.name: guard for guard in self._all}
        self._held = held
        self._adapters: dict[str, LoRARequest] = {}
        # Of sequences that no guard knows: somebody has to keep their policies.
        self._strangers: Ledger | None = None

    @classmethod
    def load(cls, files: Mapping[str, BankFiles], model: Path) -> Guards:
        """The banks that the settings name, known to be those asked for and for the base weights that are served.

        Raises BankError, naming both sides.
        """
        base = Checkpoint.open(model)
        served = base.digest()
        banks = {name: load_bank(name, each, model, served) for name, each in files.items()}
        digests = {name: bank.tuned_digest for name, bank in banks.items() if name != BASE}
        return cls(banks, HeldAdapters(base, served, digests))

    def __iter__(self) -> Iterator[Guard]:
        return iter(self._all)

    @property
    def judging(self) -> bool:
        """Whether every guard has a calibration."""
        return all(guard.judge is not None for guard in self._all)

    @property
    def base(self) -> Guard | None:
        """The base model's own."""
        return self._by_name.get(BASE)

    def ledgers(self) -> list[Ledger]:
        """Of all sequences that were judged, or could not be."""
        ledgers = [guard.judge.ledger for guard in self._all if guard.judge is not None]
        return ledgers if self._strangers is None else [*ledgers, self._strangers]

    # -- what they judge by -------------------------------------------------------------------------------------------

    def use(self, calibration: Calibration, judge_of: Callable[[Calibration], Judge]) -> str:
        """Judge by this calibration from now on, wherever its bank is; returns its digest. Raises CalibrationError; the
        old one then stays."""
        judges = [
            (guard, judge_of(calibration)) for guard in self._all if guard.bank.fingerprint == calibration.fingerprint
        ]
        for guard, judge in judges:
            guard.take(judge)
        if self._strangers is None:
            self._strangers = judge_of(calibration).ledger
        return judges[0][1].digest

    def lone(self) -> Guard:
        """The base model's own, where it is the only one. Raises ConfigError where adapters have banks: their engine
        takes no other guard while it runs."""
        if self.base is None or len(self._all) > 1:
            raise ConfigError("an engine whose adapters have banks takes no other guard while it runs: restart it")
        return self.base

    def succeed(self, bank: Bank, judge: Judge) -> None:
        """Another bank and calibration in the place of the lone guard's."""
        guard = self.lone()
        guard.take(judge)
        self.bank = guard.bank = bank
        guard.space = BankSpace.of(bank)

    def cast_shadows(self, slots: int) -> None:
        """Keep scores for every slot of the KV cache from now on."""
        for guard in self._all:
            guard.shadow = Shadow(slots)

    # -- sequences ----------------------------------------------------------------------------------------------------

    def check_adapter(self, request: LoRARequest) -> bool:
        """Whether an adapter that is about to be loaded has a bank. Raises InputError where its bank is not for it."""
        self._held.check(request)
        return request.lora_name in self._by_name

    def loaded(self, request: LoRARequest, slots: Slots) -> None:
        """An adapter was loaded. `slots`: where vLLM holds it."""
        self._held.look([request], slots)

    def admit(self, sequence: str, policy_text: object, endings: Endings, adapter: LoRARequest | None) -> None:
        """A new sequence, and the adapter that it uses."""
        if adapter is not None:
            self._adapters[sequence] = adapter
        guard = self._of(sequence)
        ledger = self._strangers if guard is None or guard.judge is None else guard.judge.ledger
        if ledger is not None:
            ledger.admit(sequence, policy_text, endings)

    def finish(self, sequences: Iterable[str]) -> None:
        """These run no more."""
        names = list(sequences)
        for ledger in self.ledgers():
            ledger.finish(names)
        for name in names:
            self._adapters.pop(name, None)

    @property
    def generation(self) -> int:
        """Of the guard that can be changed, the base model's own; 1 where there is none."""
        return 1 if self.base is None or self.base.judge is None else self.base.judge.ledger.generation

    def evidence(self, key: str) -> Evidence:
        """What is known of one HTTP request, and by which guard: the base model's, or none, where nobody guards it."""
        for guard in self._all:
            judge = guard.judge  # once: another thread asks, and the judge can be replaced
            if judge is not None and (records := judge.ledger.records(key)):
                return _evidence(judge, records)
        records = [] if self._strangers is None else self._strangers.records(key)
        return _evidence(self.base.judge if self.base else None, records)

    # -- every step ---------------------------------------------------------------------------------------------------

    def deal(self, batch: tuple[Rows, ...], readings: Readings, slots: Slots) -> Dealt:
        """A pass to whom it concerns. `slots`: where vLLM holds adapters."""
        if len(self._all) == 1 and self.base is not None and not self._adapters and not self._held.base_problem():
            return Dealt(batch, (Share(self.base, batch, readings),), {})
        used = {rows.sequence: self._adapters.get(rows.sequence) for rows in batch}
        wrong = self._held.look([adapter for adapter in used.values() if adapter is not None], slots)
        own: dict[str, list[Rows]] = {}
        unguarded: dict[str, str] = {}
        for rows in batch:
            adapter, guard = used[rows.sequence], self._of(rows.sequence)
            problem = self._held.base_problem() if adapter is None else wrong.get(identity(adapter))
            if problem is not None:
                unguarded[rows.sequence] = problem
            elif guard is None:
                unguarded[rows.sequence] = "the base model has no bank here"
            elif guard.judge is None and self._strangers is not None:
                unguarded[rows.sequence] = f"{guard.model} has no calibration here"
            else:
                own.setdefault(guard.name, []).append(rows)
        shares = (_share(self._by_name[name], part, readings) for name, part in own.items())
        return Dealt(batch, tuple(shares), unguarded)

    def see(self, dealt: Dealt, copies: Iterable[tuple[slice, slice]], where: Where) -> Seen:
        """Every guard scores its own, and keeps the scores under the slots that hold their KV; no guard's are left
        under what another, or nobody, scored.

        `copies`: from which slots to which KV was copied before the pass. `where`: slots of a sequence's positions.
        """
        moved = list(copies)
        several = len(self._all) > 1 or dealt.unguarded
        for guard in self._all:
            if guard.shadow is None:
                continue
            for source, target in moved:
                guard.shadow.copy(source, target)
            if several:
                for rows in dealt.batch:
                    guard.shadow.erase(where(rows.sequence, rows.first_position, rows.first_position + rows.count))
        passes = tuple(
            (share.guard, share.guard.judge.see(share.batch, share.readings, share.guard.shadow, where))
            for share in dealt.shares
            if share.guard.judge is not None
        )
        return Seen(dealt.batch, passes, dealt.unguarded)

    def judge(self, seen: Seen, sampled: Mapping[str, int], where: Where) -> dict[str, Stop]:
        """Every guard judges its own; says which sequences end now. `sampled`: how many tokens were drawn for each.

        Raises UnscoredError as `Judge.judge` does.
        """
        stops: dict[str, Stop] = {}
        for guard, own in seen.passes:
            if guard.judge is not None:
                stops |= guard.judge.judge(own, sampled, guard.shadow, where)
        for rows in seen.batch if seen.unguarded else ():
            if (reason := seen.unguarded.get(rows.sequence)) is not None:
                stops |= self.fail({rows.sequence: rows.count}, reason, "no_guard")
        return stops

    def fail(self, tokens: Mapping[str, int], reason: str, fault: Fault) -> dict[str, Stop]:
        """A pass could not be scored; says which of its sequences end now. `tokens`: how many of each it computed."""
        stops: dict[str, Stop] = {}
        for sequence, count in tokens.items():
            guard = self._of(sequence)
            ledger = self._strangers if guard is None or guard.judge is None else guard.judge.ledger
            if ledger is not None:
                ledger.fail(sequence, reason, count, fault)
                stops |= {name: Stop(0, token) for name, token in ledger.stops([sequence]).items()}
        return stops

    def forget(self) -> None:
        """Nobody can say whose scores the cache's slots hold."""
        for guard in self._all:
            if guard.shadow is not None:
                guard.shadow.forget()

    def _of(self, sequence: str) -> Guard | None:
        adapter = self._adapters.get(sequence)
        return self._by_name.get(BASE if adapter is None else adapter.lora_name)


def _evidence(judge: Judge | None, records: Sequence[Record]) -> Evidence:
    by = ("", "") if judge is None else (judge.calibration.fingerprint, judge.digest)
    return Evidence(fingerprint=by[0], calibration=by[1], records=tuple(records))


def _share(guard: Guard, batch: Sequence[Rows], readings: Readings) -> Share:
    """What a guard's bank sees of its own sequences in a pass, as a pass of these alone."""
    rows = torch.cat([torch.arange(each.first_row, each.first_row + each.count) for each in batch])
    starts = [0, *accumulate(each.count for each in batch)]
    moved = tuple(replace(each, first_row=start) for each, start in zip(batch, starts, strict=False))
    return Share(guard, moved, guard.place.share(readings, rows))
