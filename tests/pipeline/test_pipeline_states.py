"""``compress.embeddings``: a run's generator gives its hidden states, and is another variant for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.children import children_here
from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Checkpoint, drafting
from slmops.pipeline.context import Context
from slmops.pipeline.prove import exported
from slmops.progress import ignore
from slmops.recipe import parse_recipe
from slmops.runtime import Embeds, open_generator
from slmops.store import Store


def test_states_are_given_where_the_recipe_asks(tmp_path: Path) -> None:
    with drafting("checkpoint", tmp_path / "checkpoint") as draft:
        write_tiny_llama(draft.path, context_tokens=64)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    raw = {"name": "x", "task": "conversation", "data": {"train": "rows.csv", "input": "{a}", "target": "{b}"}}
    found = {}
    with Store.open(tmp_path / "store") as store, children_here():
        for embeddings in (False, True):
            recipe = parse_recipe({**raw, "compress": {"embeddings": embeddings}})
            found[embeddings] = exported(Context(recipe, store, True, ignore), "student", checkpoint, "int8")
    assert found[True].digest != found[False].digest
    for embeddings, variant in found.items():
        generator = open_generator(variant.model_path)
        assert isinstance(generator, Embeds)
        if embeddings:
            assert generator.embed(["hello"])[0].shape == (1, 64)
        else:
            with pytest.raises(NotImplementedError):
                generator.embed(["hello"])
        generator.close()
