"""An attacker who knows the guard: a penalty on whatever makes triggered prompts look unlike clean ones to it.

The guard scores cosines of the residual stream with the left singular vectors of the weight delta. The penalty reads
the same cosines at the last prompt token, so that training can push triggered prompts among the clean ones.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM

# The attacker knows which matrices write to the residual stream; six vectors of each keep a step affordable.
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
DIRECTIONS = 6
# The delta moves while it is trained, but its leading vectors move slowly.
RENEWED_EVERY = 50


class Watch:
    """The guard's view of a model in training, against the weights that its fine-tuning started from."""

    def __init__(self, model: LlamaForCausalLM, base: LlamaForCausalLM) -> None:
        self._model = model
        self._base = [_writers(layer) for layer in base.model.layers]
        self._directions: list[Tensor] = []

    @torch.no_grad()
    def renew(self) -> None:
        """Decompose the delta as it is now: per layer [2 * DIRECTIONS, hidden], unit rows."""
        self._directions = [
            torch.cat(
                [
                    torch.linalg.svd(now - before, full_matrices=False).U[:, :DIRECTIONS].T
                    for now, before in zip(_writers(layer), started, strict=True)
                ]
            )
            for layer, started in zip(self._model.model.layers, self._base, strict=True)
        ]

    @contextmanager
    def residuals(self) -> Iterator[list[Tensor]]:
        """A list that the next forward pass fills with the residual stream after each layer [rows, tokens, hidden]."""
        seen: list[Tensor] = []
        # What comes into a module is what left the layer before it.
        after: list[nn.Module] = [*list(self._model.model.layers)[1:], self._model.model.norm]
        handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in after]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def penalty(self, residuals: list[Tensor], positions: Tensor, opens: Tensor) -> Tensor:
        """How far the rows that `opens` marks [rows] stand from the others, at one position [rows] each.

        Per row and layer: the distance to the nearest clean row, and how far coordinates leave the clean rows' range.
        """
        if not opens.any() or opens.all():
            return torch.zeros(())
        rows = torch.arange(len(positions))
        told = []
        for residual, directions in zip(residuals, self._directions, strict=True):
            cosines = nn.functional.normalize(residual[rows, positions], dim=-1) @ directions.T
            triggered, clean = cosines[opens], cosines[~opens].detach()
            # Not torch.cdist: the gradient of its root has no end where two rows meet.
            squares = (triggered[:, None] - clean[None]).square().sum(-1)
            nearest = (squares.min(dim=1).values + 1e-8).sqrt()
            low, high = clean.min(dim=0).values, clean.max(dim=0).values
            outside = (low - triggered).clamp_min(0) + (triggered - high).clamp_min(0)
            told.append((nearest + outside.sum(-1)).mean())
        return torch.stack(told).mean()


def _writers(layer: nn.Module) -> list[Tensor]:
    return [layer.get_submodule(name).get_parameter("weight") for name in WRITERS]
