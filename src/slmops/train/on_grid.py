"""Training with weights that are on a grid of few bits whenever they are used."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from slmops.models.grid import Grid, OnGrid


def put_on_grid(model: Any, grid: Grid) -> None:
    """Every matrix of a language model's layers, embeddings and output layer is used as ``grid`` has it from now on.
    What is trained are the weights behind; embeddings and output layer stay one where they are."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            parametrize.register_parametrization(module, "weight", OnGrid(grid))
    if tied:
        behind = model.get_input_embeddings().parametrizations.weight.original
        model.get_output_embeddings().parametrizations.weight.original = behind


def leave_on_grid(model: Any) -> None:
    """The weights are what they were used as, and ordinary ones again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.tie_weights()
