"""Training with weights that are on a grid of few bits whenever they are used."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from slmops.models.grid import Grid, OnGrid

BEHIND = "parametrizations.weight.original"
"""What torch names the weight that is trained."""


def put_on_grid(model: Any, grid: Grid) -> None:
    """Every matrix of a language model's layers, embeddings and output layer is used as ``grid`` has it from now on.
    What is trained are the weights behind; embeddings and output layer stay one where they are."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            parametrize.register_parametrization(module, "weight", OnGrid(grid))
    if tied:
        embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
        output.parametrizations.weight.original = embeddings.parametrizations.weight.original
        # transformers writes a tied matrix once only where it knows its names, and these are new.
        names = {module: name for name, module in model.named_modules()}
        model._tied_weights_keys = {f"{names[output]}.{BEHIND}": f"{names[embeddings]}.{BEHIND}"}


def leave_on_grid(model: Any) -> None:
    """The weights are what they were used as, and ordinary ones again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    vars(model).pop("_tied_weights_keys", None)
    model.tie_weights()
