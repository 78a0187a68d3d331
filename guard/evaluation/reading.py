"""What a model's residual stream shows of many prompts: read with transformers, in this process, every layer at once.

The engine reads the same numbers in the forward pass of vLLM; the end-to-end tests hold the two against each other.
Evaluation reads here because baselines need what the engine never keeps: whole residuals, and those of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from guard.bank import Bank
from guard.errors import CheckpointError
from guard.roles import ROLES, RoleMap
from guard.scores import BankSpace, along, lengths_of, measure

SPEAKERS = len(ROLES) + 1
"""Whose tokens ranges are kept apart for: system, user and assistant of the prompt, and what is generated."""

Message = Mapping[str, Any]
Measured = Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""By lens: cosines and what was written, both [T, size], and lengths [T, layers]."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one bank's directions see of N requests."""

    space: BankSpace
    coordinates: torch.Tensor
    """float32 [R, size]: cosines at decision positions."""
    written: torch.Tensor
    """float32 [R, size]: what the watched layers wrote there, along their directions."""
    lengths: torch.Tensor
    """float32 [R, layers]: lengths of the residual stream there."""
    low: torch.Tensor
    """float32 [N, 4, size]: smallest cosine of any token, per speaker; +inf where there was none."""
    high: torch.Tensor
    """float32 [N, 4, size]: largest."""


@dataclass(frozen=True, slots=True)
class Reads:
    """N requests, read to the end of their answers. R decision positions in all, those of a request together."""

    completions: tuple[str, ...]
    prompt_tokens: torch.Tensor
    """int64 [N]."""
    completion_tokens: torch.Tensor
    """int64 [N]."""
    residual: torch.Tensor
    """float32 [N, layers, hidden]: after every decoder layer, at the last prompt token."""
    owners: torch.Tensor
    """int64 [R]: which request a decision position belongs to."""
    places: torch.Tensor
    """int64 [R]: tokens generated before it; 0 is the last prompt token."""
    seen: dict[str, Seen]
    """By lens."""
    bases: dict[str, torch.Tensor] = field(default_factory=dict)
    """What `residual` is in the models that this one came from, by delta."""

    def __len__(self) -> int:
        return len(self.completions)

    def only(self, wanted: torch.Tensor) -> Reads:
        """The requests where `wanted`, bool [N], is true, in their order."""
        rows = wanted[self.owners]
        numbers = wanted.long().cumsum(0) - 1
        seen = {
            name: Seen(
                each.space,
                each.coordinates[rows],
                each.written[rows],
                each.lengths[rows],
                each.low[wanted],
                each.high[wanted],
            )
            for name, each in self.seen.items()
        }
        return Reads(
            tuple(text for text, keep in zip(self.completions, wanted.tolist(), strict=True) if keep),
            self.prompt_tokens[wanted],
            self.completion_tokens[wanted],
            self.residual[wanted],
            numbers[self.owners[rows]],
            self.places[rows],
            seen,
            {name: residual[wanted] for name, residual in self.bases.items()},
        )


class Reader:
    """One model, and the lenses to look at its residual stream through. Use as a context manager."""

    def __init__(self, folder: Path, lenses: Mapping[str, Bank], max_tokens: int, batch: int = 100) -> None:
        """`lenses`: banks for this model, by name. `max_tokens`: to generate, greedily. Raises CheckpointError."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json here, expected a Hugging Face model folder")
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = "auto" if self._device == "cuda" else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self._device).eval()
        self._layers = self._model.get_decoder().layers
        self._spaces = {name: BankSpace.of(bank) for name, bank in lenses.items()}
        self._directions = {
            name: [(layer.index, layer.directions.to(self._device)) for layer in bank.layers]
            for name, bank in lenses.items()
        }
        self._roles = RoleMap.of(self._tokenizer)
        self._max_tokens = max_tokens
        self._batch = batch
        ends = self._model.generation_config.eos_token_id
        self._ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=self._device)
        self._outputs: dict[int, torch.Tensor] = {}
        self._embedded = torch.zeros(0)
        self._hooks = [layer.register_forward_hook(self._keep(index)) for index, layer in enumerate(self._layers)]
        self._hooks.append(self._layers[0].register_forward_pre_hook(self._keep_embedded, with_kwargs=True))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._outputs.clear()

    def read(self, chats: Sequence[Sequence[Message]], title: str = "", generate: bool = True) -> Reads:
        """Run conversations to the end of their answers; without `generate` only to the end of the prompt."""
        ids = [self._encode(chat) for chat in chats]
        # Prompts of about one length together: little padding.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        builder = _Builder(self._spaces, len(ids), len(self._layers), int(self._model.config.hidden_size))
        with torch.inference_mode(), tqdm(total=len(ids), desc=title, unit="prompt", disable=not title) as bar:
            for start in range(0, len(order), self._batch):
                chosen = order[start : start + self._batch]
                self._run(chosen, [ids[index] for index in chosen], builder, generate)
                bar.update(len(chosen))
        return builder.reads(self._tokenizer)

    def _encode(self, chat: Sequence[Message]) -> list[int]:
        encoded = self._tokenizer.apply_chat_template(
            [dict(message) for message in chat], add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def _run(self, requests: list[int], ids: list[list[int]], builder: _Builder, generate: bool) -> None:
        width = max(len(each) for each in ids)
        tokens = torch.zeros((len(ids), width), dtype=torch.int64, device=self._device)
        mask = torch.zeros_like(tokens)
        for row, each in enumerate(ids):
            tokens[row, width - len(each) :] = torch.tensor(each, device=self._device)
            mask[row, width - len(each) :] = 1
        output = self._model(
            input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True
        )
        stream = self._stream()
        residual = stream[:, :, 1:]
        for row, (request, each) in enumerate(zip(requests, ids, strict=True)):
            own = residual[row, width - len(each) :]
            measured = self._measure(stream[row, width - len(each) :])
            builder.prompt(request, own[-1], torch.from_numpy(self._roles.roles(each)).long(), measured)
        builder.decisions(requests, 0, self._measure(stream[:, -1]))
        drawn = output.logits[:, -1].argmax(-1)
        builder.generated(requests, drawn)
        alive = ~torch.isin(drawn, self._ends)
        cache = output.past_key_values
        for place in range(1, self._max_tokens if generate else 0):
            if not alive.any():
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = self._model(
                input_ids=drawn[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            rows = alive.nonzero().squeeze(-1)
            living = [requests[row] for row in rows.tolist()]
            measured = self._measure(self._stream()[rows, -1])
            builder.decisions(living, place, measured)
            builder.spoken(living, measured)
            drawn = output.logits[:, -1].argmax(-1)
            builder.generated(living, drawn[rows])
            alive = alive & ~torch.isin(drawn, self._ends)

    def _stream(self) -> torch.Tensor:
        """float32 [B, T, layers + 1, hidden]: the residual stream of the last pass, before the first layer and after
        each."""
        outputs = (self._outputs[index] for index in range(len(self._layers)))
        return torch.stack([self._embedded, *outputs], dim=2).float()

    def _measure(self, stream: torch.Tensor) -> Measured:
        """Of streams [T, layers + 1, hidden]."""
        found = {}
        for name, directions in self._directions.items():
            after = torch.cat([along(stream[:, index + 1], vectors) for index, vectors in directions], dim=-1)
            entered = torch.cat([along(stream[:, index], vectors) for index, vectors in directions], dim=-1)
            lengths = torch.stack([lengths_of(stream[:, index + 1]) for index, _ in directions], dim=-1)
            slots = self._spaces[name].layer_slot()
            found[name] = measure(after.cpu(), entered.cpu(), lengths.cpu(), slots)
        return found

    def _keep_embedded(self, _module: object, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._embedded = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]

    def _keep(self, index: int) -> Any:
        def hook(_module: object, _arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            self._outputs[index] = output if isinstance(output, torch.Tensor) else output[0]

        return hook


class _Builder:
    """Gathers what is read, request by request, in whatever order it comes."""

    def __init__(self, spaces: Mapping[str, BankSpace], requests: int, layers: int, hidden: int) -> None:
        self._spaces = spaces
        self._residual = torch.zeros(requests, layers, hidden)
        self._prompt_tokens = torch.zeros(requests, dtype=torch.int64)
        self._tokens: list[list[int]] = [[] for _ in range(requests)]
        self._owners: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        self._rows: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {name: [] for name in spaces}
        self._low = {name: torch.full((requests, SPEAKERS, space.size), torch.inf) for name, space in spaces.items()}
        self._high = {name: torch.full((requests, SPEAKERS, space.size), -torch.inf) for name, space in spaces.items()}

    def prompt(self, request: int, residual: torch.Tensor, roles: torch.Tensor, measured: Measured) -> None:
        self._residual[request] = residual.cpu()
        self._prompt_tokens[request] = len(roles)
        for name, (cosines, *_) in measured.items():
            for role in sorted(set(roles.tolist())):
                self._low[name][request, role] = cosines[roles == role].amin(dim=0)
                self._high[name][request, role] = cosines[roles == role].amax(dim=0)

    def spoken(self, requests: list[int], measured: Measured) -> None:
        for name, (cosines, *_) in measured.items():
            self._low[name][requests, -1] = torch.minimum(self._low[name][requests, -1], cosines)
            self._high[name][requests, -1] = torch.maximum(self._high[name][requests, -1], cosines)

    def decisions(self, requests: list[int], place: int, measured: Measured) -> None:
        self._owners.append(torch.tensor(requests))
        self._places.append(torch.full((len(requests),), place))
        for name, rows in measured.items():
            self._rows[name].append(rows)

    def generated(self, requests: list[int], tokens: torch.Tensor) -> None:
        for request, token in zip(requests, tokens.tolist(), strict=True):
            self._tokens[request].append(token)

    def reads(self, tokenizer: Any) -> Reads:
        owners, places = torch.cat(self._owners), torch.cat(self._places)
        order = torch.from_numpy(_by_owner(owners, places))
        seen = {}
        for name, rows in self._rows.items():
            cosines, written, lengths = (torch.cat(parts)[order] for parts in zip(*rows, strict=True))
            seen[name] = Seen(self._spaces[name], cosines, written, lengths, self._low[name], self._high[name])
        return Reads(
            tuple(tokenizer.batch_decode(self._tokens, skip_special_tokens=True)),
            self._prompt_tokens,
            torch.tensor([len(tokens) for tokens in self._tokens]),
            self._residual,
            owners[order],
            places[order],
            seen,
        )


def _by_owner(owners: torch.Tensor, places: torch.Tensor) -> Any:
    import numpy as np

    return np.lexsort((places.numpy(), owners.numpy()))
