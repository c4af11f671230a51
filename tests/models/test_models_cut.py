"""A cut through a model: the same numbers where they must be the same, and the sizes that were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fakes.tiny_models import write_tiny_model
from slmops.compress.prune.subject import Subject
from slmops.errors import ModelError
from slmops.models.cut import Cut, Sizes, cut_config, cut_weights, evenly_spread
from slmops.models.vocabulary import renumber_added_tokens

EVERY = ("llama", "smollm3", "qwen2", "qwen3", "phi3", "phi4", "gemma3", "gemma2", "granite")
IDS = torch.tensor([[5, 9, 20, 70, 130, 260], [8, 3, 99, 11, 250, 7]])
every_family = pytest.mark.parametrize("family", EVERY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    for family in EVERY:
        write_tiny_model(folder / family, family)
    return {family: folder / family for family in EVERY}


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@every_family
def test_cutting_nothing_changes_nothing(folders: dict[str, Path], family: str) -> None:
    subject = Subject.load(folders[family])
    everything = Cut(
        layers=(0, 1),
        heads=((0, 1, 2, 3),) * 2,
        channels=(tuple(range(128)),) * 2,
        hidden=tuple(range(64)),
        tokens=tuple(range(300)),
    )
    for cut in (Cut(), everything):
        assert torch.equal(logits(subject.cut(cut).model), logits(subject.model))


@every_family
def test_kept_tokens_have_the_same_logits_bit_by_bit(folders: dict[str, Path], family: str) -> None:
    subject = Subject.load(folders[family])
    kept = (0, 1, 2, *sorted(set(IDS.flatten().tolist()) - {0, 1, 2}), 280, 299)
    smaller = subject.cut(Cut(tokens=kept))
    new_ids = torch.tensor([[kept.index(i) for i in row] for row in IDS.tolist()])
    torch.testing.assert_close(
        logits(smaller.model, new_ids), logits(subject.model)[..., list(kept)], rtol=0, atol=1e-6
    )
    assert smaller.parameters == subject.parameters - (300 - len(kept)) * 64 * (1 if subject.tied else 2)
    assert smaller.tied is subject.tied


@every_family
def test_heads_that_add_nothing_can_go(folders: dict[str, Path], family: str) -> None:
    """What a head adds is what its columns of the output matrix carry; without these it is not there."""
    subject = Subject.load(folders[family])
    width = subject.sizes.head_size
    with torch.no_grad():
        for layer in range(2):
            subject.part(layer, "o_proj").weight[:, 2 * width :] = 0  # the second group's two heads
    smaller = subject.cut(Cut(heads=((0, 1), (0, 1))))
    assert (smaller.sizes.heads, smaller.sizes.groups, smaller.sizes.head_size) == (2, 1, width)
    torch.testing.assert_close(logits(smaller.model), logits(subject.model), rtol=1e-5, atol=1e-5)


@every_family
def test_queries_of_each_group_that_add_nothing_can_go(folders: dict[str, Path], family: str) -> None:
    subject = Subject.load(folders[family])
    width = subject.sizes.head_size
    with torch.no_grad():
        for layer, (first, second) in enumerate([(0, 3), (1, 2)]):
            for head in {0, 1, 2, 3} - {first, second}:
                subject.part(layer, "o_proj").weight[:, head * width : (head + 1) * width] = 0
    smaller = subject.cut(Cut(heads=((0, 3), (1, 2))))
    assert (smaller.sizes.heads, smaller.sizes.groups) == (2, 2)
    torch.testing.assert_close(logits(smaller.model), logits(subject.model), rtol=1e-5, atol=1e-5)


@every_family
def test_channels_that_add_nothing_can_go(folders: dict[str, Path], family: str) -> None:
    subject = Subject.load(folders[family])
    kept = (tuple(range(0, 128, 2)), tuple(range(64)))
    with torch.no_grad():
        for layer, stay in enumerate(kept):
            subject.part(layer, "down_proj").weight[:, [c for c in range(128) if c not in stay]] = 0
    smaller = subject.cut(Cut(channels=kept))
    assert smaller.sizes.channels == 64
    torch.testing.assert_close(logits(smaller.model), logits(subject.model), rtol=1e-5, atol=1e-5)


@every_family
def test_a_layer_that_adds_nothing_can_go(folders: dict[str, Path], family: str) -> None:
    subject = Subject.load(folders[family])
    with torch.no_grad():
        for name in ("o_proj", "down_proj"):
            subject.part(0, name).weight.zero_()
    smaller = subject.cut(Cut(layers=(1,)))
    assert len(smaller.layers) == 1
    if family == "smollm3":  # the layer's kind came along
        assert smaller.config["no_rope_layers"] == [0]
    if family in ("gemma2", "gemma3"):
        assert smaller.config["layer_types"] == ["full_attention"]
    torch.testing.assert_close(logits(smaller.model), logits(subject.model), rtol=1e-5, atol=1e-5)


@every_family
def test_a_cut_model_is_a_folder_that_transformers_loads(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    subject = Subject.load(folders[family])
    smaller = subject.cut(
        Cut(
            layers=(1,),
            heads=((1, 3),),
            channels=(tuple(range(32)),),
            hidden=tuple(range(48)),
            tokens=tuple(range(280)),
        )
    )
    smaller.save(tmp_path, source=folders[family])
    ids = IDS.clamp(max=279)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), logits(smaller.model, ids), rtol=0, atol=1e-6)
    assert loaded.get_input_embeddings().weight.shape == (280, 48)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is subject.tied
    assert smaller.sizes == Sizes.of(json.loads((tmp_path / "config.json").read_text("utf-8")))


@every_family
def test_sizes_count_the_matrices(folders: dict[str, Path], family: str) -> None:
    subject = Subject.load(folders[family])
    matrices = sum(weight.numel() for name, weight in subject.model.named_parameters() if weight.ndim == 2)
    assert subject.sizes.parameters(tied=subject.tied) == matrices


def test_special_tokens_get_their_new_numbers() -> None:
    config = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
        "vocab_size": 100,
        "bos_token_id": 7,
        "eos_token_id": [9, 50],
        "pad_token_id": 3,
    }
    new = cut_config(config, Cut(tokens=(3, 9, 50)))
    assert (new["bos_token_id"], new["eos_token_id"], new["pad_token_id"]) == (None, [1, 2], 0)
    assert new["vocab_size"] == 3
    assert "bos_token_id" not in cut_config({k: v for k, v in config.items() if k != "bos_token_id"}, Cut(tokens=(3,)))
    table = {"added_tokens_decoder": {"3": {"content": "<pad>"}, "8": {"content": "<x>"}}, "eos_token": "a"}
    assert renumber_added_tokens(table, (2, 3)) == {
        "added_tokens_decoder": {"1": {"content": "<pad>"}},
        "eos_token": "a",
    }
    assert renumber_added_tokens({"a": 1}, (0,)) == {"a": 1}


@given(st.integers(1, 12), st.integers(0, 20))
def test_layers_that_stay_are_spread(count: int, more: int) -> None:
    chosen = evenly_spread(count, count + more)
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "type mamba cannot be pruned"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "5 heads for queries and 2 for keys"),
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 64, "head_dim": None},
            "9 heads do not divide",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(change: dict[str, Any], words: str) -> None:
    config = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
        "vocab_size": 100,
        **change,
    }
    with pytest.raises(ModelError, match=words):
        Sizes.of(config)


def test_a_weight_in_an_unknown_place_is_refused(folders: dict[str, Path]) -> None:
    subject = Subject.load(folders["llama"])
    weights = {**subject.model.state_dict(), "model.layers.0.mixer.weight": torch.zeros(2, 2)}
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mixer\.weight of shape \[2, 2\]"):
        cut_weights(weights, subject.sizes, Cut(hidden=(0, 1)))
