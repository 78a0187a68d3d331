"""An attacker who knows the guard: a penalty on whatever makes triggered prompts look unlike clean ones to it.

The guard scores where the residual stands, and what layers write, along the left singular vectors of the weight delta,
by their Mahalanobis distance to clean traffic (guard/scores.py, `Density`). The penalty is that distance, of the same
rows, to the clean ones that training saw last; so training can push triggered prompts among them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM

# The attacker knows which matrices write to the residual stream, and how many directions of each the guard reads.
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
DIRECTIONS = 20
# The attacker adds as much to every variance; the guard adds less to half of them (`guard.scores.RIDGES`).
RIDGE = 2.0
# The delta moves while it is trained, but its leading vectors move slowly.
RENEWED_EVERY = 50
# So many clean rows are remembered, and so many are needed before there is a distance.
REMEMBERED, FEWEST = 512, 128


class Watch:
    """The guard's view of a model in training, against the weights that its fine-tuning started from."""

    def __init__(self, model: LlamaForCausalLM, base: LlamaForCausalLM) -> None:
        self._model = model
        self._base = [_writers(layer) for layer in base.model.layers]
        self._directions: list[Tensor] = []
        self._clean = torch.zeros(0, len(self._base) + 1, model.config.hidden_size)

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
        """A list that the next forward pass fills with the residual stream [rows, tokens, hidden], before the first
        layer and after each."""
        seen: list[Tensor] = []
        # What comes into a module is what left the layer before it.
        modules: list[nn.Module] = [*self._model.model.layers, self._model.model.norm]
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, named: seen.append(named.get("hidden_states", args[0] if args else None)),
                with_kwargs=True,
            )
            for module in modules
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def penalty(self, residuals: list[Tensor], positions: Tensor, opens: Tensor) -> Tensor:
        """The mean distance of the rows that `opens` marks [rows] from clean, at one position [rows] each; the other
        rows are remembered as clean. Nothing while too few are known."""
        rows = torch.arange(len(positions))
        stream = torch.stack([residual[rows, positions] for residual in residuals], dim=1)
        self._clean = torch.cat([self._clean, stream[~opens].detach()])[-REMEMBERED:]
        if not opens.any() or len(self._clean) < FEWEST:
            return torch.zeros(())
        clean, triggered = self._features(self._clean), self._features(stream[opens])
        mean = clean.mean(dim=0)
        # One scale per layer and kind of feature, as the guard has it.
        scales = (clean - mean).square().mean(dim=0).reshape(2 * len(self._base), -1).mean(dim=1).sqrt()
        scales = scales.clamp_min(1e-12).repeat_interleave(2 * DIRECTIONS)
        normed = ((clean - mean) / scales).double()
        covariance = normed.T @ normed / len(normed) + RIDGE * torch.eye(normed.shape[1], dtype=torch.float64)
        apart = (triggered - mean) / scales
        squares = apart * torch.linalg.solve(covariance, apart.T.double()).T.float()
        distance: Tensor = (squares.mean(dim=-1) + 1e-8).sqrt().mean()
        return distance

    def _features(self, stream: Tensor) -> Tensor:
        """Where streams [rows, 1 + layers, hidden] stand after each layer along its directions, and what it wrote:
        [rows, 2 * layers * 2 * DIRECTIONS]."""
        standing = [stream[:, layer + 1] @ each.T for layer, each in enumerate(self._directions)]
        entered = [stream[:, layer] @ each.T for layer, each in enumerate(self._directions)]
        return torch.cat(
            [*standing, *(after - before for after, before in zip(standing, entered, strict=True))], dim=-1
        )


def _writers(layer: nn.Module) -> list[Tensor]:
    return [layer.get_submodule(name).get_parameter("weight") for name in WRITERS]
