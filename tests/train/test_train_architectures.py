"""Logit distillation in every architecture: a teacher's token signals reach a student of the same family.

LoRA, QLoRA and merging are in ``test_train_methods.py``, by the same list of families.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train_generator import chats, load, to_messages
from test_train_token_signals import divergence_from, keep, reference
from train_helpers import make_draft

from fakes.tiny_models import ARCHITECTURES, SCALING, write_tiny_model
from slmops.artifacts import Dataset, Draft
from slmops.artifacts.token_signals import TokenSignals
from slmops.models.scaled_logits import scaled_logits
from slmops.recipe import DistillConfig, LossWeights, StudentConfig, TrainConfig
from slmops.train import train_generator_student
from slmops.train.generator.answers import collate_rows, encode_splits, supervised_logits
from slmops.train.generator.taught import OnlineTeacher, Taught, TaughtObjective
from slmops.train.student import shallow_copy

TRAIN = TrainConfig(precision="fp32", batch_size=4, epochs=12, learning_rate=5e-3)
LISTENING = DistillConfig(losses=LossWeights(gold=0, forward_kl=1))

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def teach(folder: Path, dataset: Dataset, draft: Draft, distill: DistillConfig, **more: Any) -> Path:
    student = more.pop("student", StudentConfig(layers=1))
    train = more.pop("train", TRAIN)
    train_generator_student(dataset, folder, to_messages, student, train, 0, draft, distill=distill, **more)
    return draft.path


@every_architecture
def test_a_cut_student_hears_its_teacher(architecture: str, tmp_path: Path) -> None:
    """What is on disk afterwards, read anew, is nearer to the teacher than a student of the answers' text alone."""
    teacher, dataset = tmp_path / "teacher", chats(tmp_path / "data", 4)
    write_tiny_model(teacher, architecture)
    signals = keep(teacher, dataset, tmp_path / "signals", top_k=40)
    logs, _ = reference(teacher, dataset)
    kept = TokenSignals.read(signals, "train").records
    np.testing.assert_array_equal(kept["ids"], logs.topk(40, dim=-1).indices)
    draft = make_draft(tmp_path / "taught")
    taught = teach(teacher, dataset, draft, LISTENING, signals=[signals])
    plain = teach(teacher, dataset, make_draft(tmp_path / "plain"), DistillConfig())
    assert divergence_from(teacher, taught, dataset) < 0.5 * divergence_from(teacher, plain, dataset)
    assert draft.metrics["packed"] is True


@every_architecture
def test_what_is_saved_is_what_was_trained(architecture: str, tmp_path: Path) -> None:
    """Trimmed and cut, the student on disk computes what it did in training: scales, windows, rotation."""
    teacher, dataset = tmp_path / "teacher", chats(tmp_path / "data", 2)
    write_tiny_model(teacher, architecture)
    draft = make_draft(tmp_path / "student")
    teach(teacher, dataset, draft, DistillConfig(), train=TRAIN.model_copy(update={"epochs": 2}))
    from slmops.chat import ChatTokenizer

    rows = encode_splits(ChatTokenizer.load(draft.path), dataset, to_messages, 512)["validation"]
    [last] = [point for point in _history(draft) if "validation_loss" in point][-1:]
    model, total, count = load(draft.path), 0.0, 0
    for row in rows:
        with torch.no_grad():
            ids = torch.tensor([row.tokens])
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        learnt = torch.tensor(row.supervised[1:])
        total, count = total + losses[learnt].sum().item(), count + int(learnt.sum())
    assert total / count == pytest.approx(last["validation_loss"], rel=1e-4)


@every_architecture
def test_a_teacher_beside_shows_states_and_attention(architecture: str, tmp_path: Path) -> None:
    teacher, dataset = tmp_path / "teacher", chats(tmp_path / "data", 1)
    write_tiny_model(teacher, architecture)
    config = DistillConfig(losses=LossWeights(gold=0.5, forward_kl=1, hidden=0.5, attention=0.5), top_k=None)
    draft = make_draft(tmp_path / "named")
    more = {"student": StudentConfig(model="x"), "train": TRAIN.model_copy(update={"epochs": 1})}
    folder = teach(teacher, dataset, draft, config, teacher_folder=teacher, **more)
    before, after = load_file(teacher / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@every_architecture
def test_a_student_that_is_its_teacher_differs_in_nothing(architecture: str, tmp_path: Path) -> None:
    teacher, dataset = tmp_path / "teacher", chats(tmp_path / "data", 1)
    write_tiny_model(teacher, architecture)
    from slmops.chat import ChatTokenizer

    rows = encode_splits(ChatTokenizer.load(teacher), dataset, to_messages, 512)["train"]
    online = OnlineTeacher(teacher, None, attentions=True)
    student = load(teacher)
    student.set_attn_implementation("eager")
    for losses in (LossWeights(gold=0, forward_kl=1, jsd=1), LossWeights(gold=0, attention=1)):
        config = DistillConfig(losses=losses, top_k=None)
        objective = TaughtObjective(rows, rows, config, online=online, layer_map={0: 0, 1: 1})
        assert objective.loss(student, objective.collate([0, 1])).item() == pytest.approx(0, abs=1e-5)
    assert Taught(student, {0: 0}, online.hidden_size).projections["0"].in_features == 64
    assert (online.layers, online.hidden_size) == (2, 64)


@pytest.mark.parametrize("architecture", SCALING)
def test_logits_are_scaled_as_the_model_scales_them(architecture: str, tmp_path: Path) -> None:
    """What the output layer alone gives becomes what the whole model says."""
    model = write_tiny_model(tmp_path, architecture)
    ids = torch.tensor([list(range(3, 40))])
    with torch.no_grad():
        expected = model(ids).logits
        plain = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(scaled_logits(plain, model.config), expected)
    assert not torch.allclose(plain, expected, rtol=0.01)


def test_a_cap_holds_and_a_scale_that_another_family_names_does_not_count() -> None:
    from transformers import Gemma2Config, LlamaConfig

    assert scaled_logits(torch.tensor(1e6), Gemma2Config(final_logit_softcapping=5.0)).item() == pytest.approx(5.0)
    assert scaled_logits(torch.tensor(7.0), LlamaConfig(logit_scale=0.5, logits_scaling=3.0)).item() == 7


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere"])
def test_what_is_kept_and_learnt_is_scaled(architecture: str, tmp_path: Path) -> None:
    """Token signals on disk, the training loss, and a student beside its teacher."""
    from slmops.chat import ChatTokenizer

    teacher, dataset = tmp_path / "teacher", chats(tmp_path / "data", 1)
    write_tiny_model(teacher, architecture)
    logs, _ = reference(teacher, dataset)
    kept = TokenSignals.read(keep(teacher, dataset, tmp_path / "signals"), "train").records
    np.testing.assert_allclose(kept["logs"].astype(np.float64), logs.topk(6, dim=-1).values, atol=0.02)
    rows, student = encode_splits(ChatTokenizer.load(teacher), dataset, to_messages, 512)["train"], load(teacher)
    one = collate_rows(rows[:1])
    with torch.no_grad():
        logits, targets = supervised_logits(student, one)
        whole = student(input_ids=one["input_ids"]).logits[:, :-1][one["supervised"][:, 1:].bool()]
    torch.testing.assert_close(logits, whole)
    online = OnlineTeacher(teacher, None, attentions=False)
    config = DistillConfig(losses=LossWeights(gold=1, forward_kl=1), top_k=None)
    objective = TaughtObjective(rows[:1], rows[:1], config, online=online)
    expected = torch.nn.functional.cross_entropy(whole, targets).item()
    assert objective.loss(student, objective.collate([0])).item() == pytest.approx(expected, rel=1e-4)


def test_layers_without_rotation_stay_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, no_rope_layers=[1, 1, 0], initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    SmolLM3ForCausalLM(config).save_pretrained(tmp_path / "teacher")
    student: Any = shallow_copy(tmp_path / "teacher", None, 2).eval()
    student.save_pretrained(tmp_path / "student")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert again.config.no_rope_layers == [1, 0]
    ids = torch.tensor([list(range(1, 13))])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, student(ids).logits)


def _history(draft: Draft) -> list[dict[str, float]]:
    import json

    points: list[dict[str, float]] = json.loads((draft.path / "history.json").read_text("utf-8"))
    return points
