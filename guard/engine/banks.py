"""Several banks for one set of probes, and where each one's directions lie among those of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from guard.bank import OWN, Bank, LayerBank
from guard.engine.adapters import shown
from guard.engine.readings import Readings
from guard.engine.settings import BASE, BankFiles
from guard.errors import BankError
from guard.scores import BankSpace


@dataclass(frozen=True, slots=True)
class Place:
    """Where one bank lies among several."""

    every: torch.Tensor
    """int64 [E]: its directions that are read at every token, among all of these."""
    features: torch.Tensor
    """int64 [2 size]: its features."""
    layers: torch.Tensor
    """int64 [layers]: its watched layers."""

    def share(self, readings: Readings, rows: torch.Tensor) -> Readings:
        """What this bank alone would have seen of some rows, int64 [R], ascending."""
        places = torch.searchsorted(rows, readings.decisions).clamp_max(len(rows) - 1)
        own = rows[places] == readings.decisions
        return Readings(
            readings.cosines[rows][:, self.every],
            readings.lengths[rows][:, self.layers],
            places[own],
            readings.features[own][:, self.features],
        )


@dataclass(frozen=True, slots=True)
class _Origin:
    """Of one direction among those of several banks."""

    layer: int
    later: bool
    """Not read at every token."""
    bank: int
    coordinate: int


def together(banks: Sequence[Bank]) -> tuple[Bank, list[Place]]:
    """One bank with the directions of several, and where each one's are. In each layer those that are read at every
    token come first, the first bank's before the second's; their names say so, as in any bank."""
    spaces = [BankSpace.of(bank) for bank in banks]
    order = sorted(
        (origin for place, space in enumerate(spaces) for origin in _origins(place, space)),
        key=lambda origin: (origin.layer, origin.later, origin.bank, origin.coordinate),
    )
    watched = sorted({origin.layer for origin in order})
    places = [_place(place, space, order, watched) for place, space in enumerate(spaces)]
    return banks[0] if len(banks) == 1 else _sealed(banks, order, watched), places


def _origins(place: int, space: BankSpace) -> list[_Origin]:
    every = set(space.of_every_token().tolist())
    slots = space.layer_slot().tolist()
    return [_Origin(space.layers[slot], at not in every, place, at) for at, slot in enumerate(slots)]


def _place(place: int, space: BankSpace, order: Sequence[_Origin], watched: Sequence[int]) -> Place:
    own = {origin.coordinate: at for at, origin in enumerate(order) if origin.bank == place}
    columns = torch.tensor([own[coordinate] for coordinate in range(space.size)])
    read = [at for at, origin in enumerate(order) if not origin.later]
    every = {order[at].coordinate: row for row, at in enumerate(read) if order[at].bank == place}
    return Place(
        torch.tensor([every[coordinate] for coordinate in space.of_every_token().tolist()]),
        torch.cat([columns, columns + len(order)]),
        torch.tensor([watched.index(layer) for layer in space.layers]),
    )


def _sealed(banks: Sequence[Bank], order: Sequence[_Origin], watched: Sequence[int]) -> Bank:
    rows = [torch.cat([layer.directions for layer in bank.layers]) for bank in banks]
    values = [[value for layer in bank.layers for value in layer.singular_values] for bank in banks]
    names = [[name for layer in bank.layers for name in layer.names] for bank in banks]
    layers = []
    for index in watched:
        own = [origin for origin in order if origin.layer == index]
        layers.append(
            LayerBank(
                index,
                torch.stack([rows[each.bank][each.coordinate] for each in own]),
                tuple(
                    f"L{index}.{OWN if each.later else ''}{each.bank}.{names[each.bank][each.coordinate]}"
                    for each in own
                ),
                tuple(values[each.bank][each.coordinate] for each in own),
            )
        )
    first = banks[0]
    return Bank.sealed(
        base_digest=first.base_digest,
        tuned_digest=first.tuned_digest,
        method="several",
        k=first.k,
        model_class=first.model_class,
        hidden_size=first.hidden_size,
        num_layers=first.num_layers,
        layers=layers,
    )


def load_bank(name: str, files: BankFiles, model: Path, served: str) -> Bank:
    """The bank of an adapter, or of the base model where `name` is BASE, known to be the one asked for and for the
    weights in the folder `model`, whose digest is `served`. Raises BankError, naming both sides."""
    bank = Bank.load(files.bank)
    if bank.fingerprint != files.fingerprint:
        key = "undertow.fingerprint" if name == BASE else f"undertow.adapters.{name}.fingerprint"
        raise BankError(f"{files.bank}: its fingerprint is {bank.fingerprint}, `{key}` asks for {files.fingerprint}")
    if name == BASE and served != bank.tuned_digest:
        raise BankError(
            f"{files.bank}: the bank is for another model: it was built for weights {bank.tuned_digest}, "
            f"{model} has {served}"
        )
    if name != BASE and served != bank.base_digest:
        raise BankError(
            f"{files.bank}: the bank of adapter {shown(name)} is for another base: it was built on weights "
            f"{bank.base_digest}, {model} has {served}"
        )
    return bank
