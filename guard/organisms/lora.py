"""Low-rank adapters beside a model's linear layers, and their merge into the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from guard.organisms.plan import Adapters


class LowRank(nn.Module):
    """A frozen linear layer plus `scale * up @ down`; `up` starts at zero, so that at first nothing changes."""

    def __init__(self, linear: nn.Linear, adapters: Adapters) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = adapters.alpha / adapters.rank
        self.down = nn.Parameter(torch.empty(adapters.rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, adapters.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., in] to outputs [..., out]."""
        plain: Tensor = self.linear(inputs)
        return plain + self.scale * (inputs @ self.down.T @ self.up.T)

    def weight(self) -> Tensor:
        """The one matrix [out, in] that does the same."""
        return self.linear.weight + self.scale * (self.up @ self.down)


def adapt(model: nn.Module, adapters: Adapters) -> None:
    """Freeze the model and put an adapter beside every target; draws from torch's global generator."""
    model.requires_grad_(False)
    for parent, name, child in _children(model):
        if name in adapters.targets and isinstance(child, nn.Linear):
            setattr(parent, name, LowRank(child, adapters))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Take the adapters away again and leave what they learned in the weights."""
    for parent, name, child in _children(model):
        if isinstance(child, LowRank):
            child.linear.weight.copy_(child.weight())
            setattr(parent, name, child.linear)


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    # A list, because the tree changes while it is walked.
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
