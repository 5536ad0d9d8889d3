"""A model that has a bit of everything, one whose layers are tied, and steps of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def make_model() -> Any:  # an nn.Sequential; Any, since its parts are taken by number
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))


def train(model: Any, count: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()


class TiedHead(nn.Module):
    """Its two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight
