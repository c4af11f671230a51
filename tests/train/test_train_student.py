"""What is cut out of a teacher: shapes, weights, and the same numbers where they must be the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fakes.tiny_models import tiny_tokenizer
from slmops.errors import ModelError
from slmops.models.classifier import PooledClassifier, load_classifier, save_classifier
from slmops.models.cut import evenly_spread
from slmops.train.student import (
    EMBEDDING_SCALE,
    StudentShape,
    narrow_encoder,
    principal_components,
    shallow_copy,
    teacher_embeddings,
)

KEPT = tuple(range(0, 300, 2))
SHAPE = StudentShape(layers=2, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers, output layer of its own."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=[2, 0],
            pad_token_id=3,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
    )
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def states(encoder: Any, ids: list[int], mask: list[int] | None = None) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = encoder(
            input_ids=torch.tensor([ids]), attention_mask=None if mask is None else torch.tensor([mask])
        ).last_hidden_state
    return found


# --- narrow encoders --------------------------------------------------------------------------------------------


def test_a_narrow_encoder_has_the_shape_asked_for(llama: Path) -> None:
    encoder: Any = narrow_encoder(llama, KEPT, SHAPE)
    config = encoder.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 64, 96)
    assert (config.vocab_size, config.num_attention_heads, config.head_dim) == (150, 1, 64)
    assert encoder.embed_tokens.weight.shape == (150, 64)
    assert states(encoder, [1, 5, 9]).shape == (1, 3, 64)


@pytest.mark.parametrize("masked", [False, True])
def test_a_later_token_changes_an_earlier_state(llama: Path, masked: bool) -> None:
    """Bidirectional: and padding behind changes nothing."""
    encoder: Any = narrow_encoder(llama, KEPT, SHAPE).eval()
    mask = [1] * 5 if masked else None
    first, second = states(encoder, [1, 2, 3, 4, 5], mask), states(encoder, [1, 2, 3, 4, 99], mask)
    assert (first[0, 0] - second[0, 0]).abs().max() > 1e-4
    padded = states(encoder, [1, 2, 3, 4, 5, 0, 0], [1, 1, 1, 1, 1, 0, 0])
    torch.testing.assert_close(padded[:, :5], first, atol=1e-5, rtol=1e-4)


def test_it_stays_bidirectional_on_disk(llama: Path, tmp_path: Path) -> None:
    classifier = PooledClassifier(narrow_encoder(llama, KEPT, SHAPE), ("a", "b", "c")).eval()
    save_classifier(classifier, tmp_path)
    again = load_classifier(tmp_path)
    assert again.labels == ("a", "b", "c")
    ids, mask = torch.tensor([[1, 2, 3, 4], [7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        assert torch.equal(classifier(ids, mask), again(ids, mask))
    first, second = (states(again.backbone, [1, 2, 3, last]) for last in (4, 99))
    assert (first[0, 0] - second[0, 0]).abs().max() > 1e-4


def test_its_embeddings_are_the_teachers_projected(llama: Path) -> None:
    encoder: Any = narrow_encoder(llama, KEPT, StudentShape(1, 64, 64))
    found = encoder.embed_tokens.weight.detach().numpy()
    rows = load_file(llama / "model.safetensors")["model.embed_tokens.weight"].numpy()[list(KEPT)]
    # All 64 dimensions are kept here, so distances between tokens keep their proportions.
    before = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    after = np.linalg.norm(found[:, None] - found[None], axis=-1)
    np.testing.assert_allclose(after * (before[0, 1] / after[0, 1]), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("tokens", "width", "dimensions"), [(50, 20, 6), (20, 50, 20), (200, 8, 8)])
def test_principal_components_are_numpys(tokens: int, width: int, dimensions: int) -> None:
    random = np.random.default_rng(4)
    rows = random.normal(size=(tokens, width)) * np.linspace(0.1, 3, width) + 5.0
    found = principal_components(torch.tensor(rows), dimensions).numpy()
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    expected = centred @ vectors[:, np.argsort(-values)[:dimensions]]
    signs = np.sign((found * expected).sum(axis=0))
    expected = expected * signs
    scale = EMBEDDING_SCALE / expected.std(ddof=1)
    solid = slice(0, min(dimensions, tokens - 1))  # centring leaves one direction less than there are tokens
    np.testing.assert_allclose(found[:, solid], (expected * scale)[:, solid], atol=1e-6)
    assert found.std(ddof=1) == pytest.approx(EMBEDDING_SCALE)


@pytest.mark.parametrize(
    ("hidden_size", "kept", "words"),
    [
        (100, KEPT, "hidden_size is 100"),
        (128, KEPT, "kept embeddings have only 64 dimensions"),
        (64, KEPT[:50], "kept embeddings have only 50 dimensions"),
    ],
)
def test_impossible_shapes_say_so(llama: Path, hidden_size: int, kept: tuple[int, ...], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        narrow_encoder(llama, kept, StudentShape(1, hidden_size, 64))
    assert "hoose a" in (caught.value.remedy or "")


def test_embeddings_are_found_in_any_file_and_type(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"model.embed_tokens.weight": embeddings.bfloat16()}, tmp_path / "model-00002-of-00002.safetensors")
    found = teacher_embeddings(tmp_path)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, embeddings, atol=0.01, rtol=0.01)


def test_a_model_of_another_make_is_refused(tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no embeddings named embed_tokens\.weight") as caught:
        teacher_embeddings(tmp_path)
    assert caught.value.remedy == "Name a student.model instead."


# --- shallow copies ---------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 40))
def test_evenly_spread(count: int, more: int) -> None:
    chosen = evenly_spread(count, count + more)
    assert len(chosen) == count == len(set(chosen))
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    if count > 1:
        assert chosen[-1] == count + more - 1
        gaps = np.diff(chosen)
        assert max(gaps) - min(gaps) <= 1


def test_a_shallow_copy_keeps_the_chosen_layers(deep: Path) -> None:
    teacher: Any = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32)
    student: Any = shallow_copy(deep, None, 3)
    assert student.config.num_hidden_layers == len(student.model.layers) == 3
    for index, source in enumerate([0, 3, 6]):
        for name, tensor in teacher.model.layers[source].state_dict().items():
            assert torch.equal(student.model.layers[index].state_dict()[name], tensor), (index, name)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])


def test_all_layers_are_the_teacher(deep: Path) -> None:
    teacher: Any = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32).eval()
    student: Any = shallow_copy(deep, None, 7).eval()
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_kept_tokens_have_the_logits_of_the_full_model(llama: Path, deep: Path, tied: bool) -> None:
    """The same layers, fewer rows: what is kept is equal to the last bit."""
    folder = llama if tied else deep
    layers = 2 if tied else 7
    kept = (0, 1, 2, 3, *range(10, 200, 3))
    teacher: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student: Any = shallow_copy(folder, kept, layers).eval()
    new_ids = {old: new for new, old in enumerate(kept)}
    old = [1, 10, 13, 70, 100]
    with torch.no_grad():
        full = teacher(torch.tensor([old])).logits[:, :, list(kept)]
        cut = student(torch.tensor([[new_ids[i] for i in old]])).logits
    assert cut.shape == (1, 5, len(kept))
    torch.testing.assert_close(cut, full, atol=1e-5, rtol=1e-5)
    shared = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert shared == tied
    assert student.config.vocab_size == len(kept)
    assert student.config.eos_token_id == (2 if tied else [2, 0])


def test_special_ids_are_renumbered(deep: Path) -> None:
    student: Any = shallow_copy(deep, (1, 2, 3, 50, 60), 2)
    for config in (student.config, student.generation_config):
        assert config.bos_token_id == 0
        assert config.eos_token_id == [1]  # token 0 is gone
        assert config.pad_token_id == 2
    gone: Any = shallow_copy(deep, (2, 50, 60), 2)
    assert gone.config.bos_token_id is None


def test_it_generates_with_a_cache_as_without(deep: Path, tmp_path: Path) -> None:
    """Each layer writes to its own place in the cache; also after a journey over the disk."""
    student: Any = shallow_copy(deep, None, 3).eval()
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    student.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = torch.tensor([[1, 20, 30, 40]])
    ends = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 3}
    slow = student.generate(prompt, use_cache=False, **ends)
    assert slow.shape == (1, 16)
    for model in (student, again):
        assert torch.equal(model.generate(prompt, use_cache=True, **ends), slow)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_tied_and_trimmed_copy_survives_the_disk(llama: Path, tmp_path: Path) -> None:
    student: Any = shallow_copy(llama, KEPT, 1).eval()
    student.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(student(ids).logits, again(ids).logits)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_more_layers_than_there_are(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"student\.layers is 3, but the teacher has 2") as caught:
        shallow_copy(llama, None, 3)
    assert caught.value.remedy == "Choose fewer."


def test_layers_of_several_kinds_keep_their_kinds(tmp_path: Path) -> None:
    """Models whose layers take turns (sliding window, full) must not mix them up."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "teacher")
    student: Any = shallow_copy(tmp_path / "teacher", None, 2).eval()
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    student.save_pretrained(tmp_path / "student")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    ids = torch.tensor([list(range(1, 13))])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_layers_that_are_not_where_they_are_expected(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPT2LMHeadModel") as caught:
        shallow_copy(tmp_path, None, 1)
    assert caught.value.remedy == "Name a student.model instead."
