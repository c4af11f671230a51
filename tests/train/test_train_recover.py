"""Training after pruning: nearer to the whole model than before, and zeros that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_helpers import make_dataset, make_draft, toy_dataset, toy_rows
from transformers import AutoModelForCausalLM

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.chat.files import open_tokenizer
from slmops.compress.prune.checkpoint import prune_checkpoint
from slmops.errors import DataError, ModelError
from slmops.models.classifier import load_classifier
from slmops.recipe import DistillConfig, LossWeights, PruneConfig, RecoverConfig, StudentConfig, TrainConfig
from slmops.train import recover_generator, train_classifier_student
from slmops.train.sparse import keep_zeros
from slmops.train.student import StudentShape, narrow_encoder

TRAIN = TrainConfig(precision="fp32", batch_size=4, max_tokens=64)


def shown(row: Row) -> tuple[Message, ...]:
    return row.messages


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    write_tiny_llama(folder)
    return folder


def pruned(whole: Path, to: Path, *, closed: bool = False, **config: Any) -> Path:
    to.mkdir(parents=True)
    (to.with_name("prune-work")).mkdir(exist_ok=True)
    prune_checkpoint(
        whole,
        Draft(to, to.with_name("prune-work")),
        PruneConfig(rows=8, **config),
        toy_rows(12, 0),
        to_messages=None if closed else shown,
        max_tokens=64,
        seed=0,
    )
    return to


def distance(whole: Path, other: Path) -> float:
    """Mean KL from the whole model's next token where that is the answer's, over some rows."""
    chat, found = ChatTokenizer.load(whole), []
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (whole, other)]
    for row in toy_rows(12, 0):
        both = chat.encode_training(row.messages, row.target or "")
        ids, answer = torch.tensor([both.input_ids]), torch.tensor(both.loss_mask[1:])
        with torch.no_grad():
            logs = [model(input_ids=ids).logits[0, :-1][answer].log_softmax(dim=-1) for model in models]
        found.append((logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("config", [{"channels": 0.5}, {"sparsity": {"share": 0.6, "method": "magnitude"}}])
def test_a_recovered_model_is_nearer_to_the_whole_one(whole: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    small = pruned(whole, tmp_path / "small", **config)
    dataset = toy_dataset(tmp_path / "data")
    draft = make_draft(tmp_path)
    config_of = RecoverConfig(epochs=10, learning_rate=3e-3, losses=LossWeights(gold=0, forward_kl=1))
    recover_generator(small, whole, dataset, shown, config_of, TRAIN, 0, draft)
    assert distance(whole, draft.path) < 0.6 * distance(whole, small)
    before, after = (load_file(folder / "model.safetensors") for folder in (small, draft.path))
    for name, weight in before.items():
        if "sparsity" in config and "proj" in name:
            assert torch.equal(after[name] == 0, weight == 0), name
        assert not torch.equal(after[name], weight)
    assert draft.metrics["parameters"] < 1e6


def test_a_trimmed_model_learns_from_the_whole_vocabulary(whole: Path, tmp_path: Path) -> None:
    small = pruned(whole, tmp_path / "small", vocabulary="trim", channels=0.5)
    draft = make_draft(tmp_path)
    recover_generator(small, whole, toy_dataset(tmp_path / "data"), shown, RecoverConfig(epochs=1), TRAIN, 0, draft)
    assert AutoModelForCausalLM.from_pretrained(draft.path).config.vocab_size < 300
    assert (draft.path / "tokenizer.json").read_text("utf-8")
    # It cannot learn from a model with other tokens.
    with pytest.raises(ModelError, match="was not made from it"):
        recover_generator(whole, small, toy_dataset(tmp_path / "more"), shown, RecoverConfig(epochs=1), TRAIN, 0, draft)


def test_rows_without_answers_are_refused(whole: Path, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", {"train": [Row("1", (Message("user", "hello"),), None)]})
    with pytest.raises(DataError, match="No row of the train split has an answer"):
        recover_generator(whole, whole, dataset, shown, RecoverConfig(), TRAIN, 0, make_draft(tmp_path))


def test_a_pruned_classifier_goes_on_from_where_it_is(whole: Path, tmp_path: Path) -> None:
    """From its own weights and tokenizer; its zeros stay; it learns."""
    from slmops.models.classifier import PooledClassifier, save_classifier

    torch.manual_seed(0)
    first = tmp_path / "first"
    classifier = PooledClassifier(
        narrow_encoder(whole, tuple(range(300)), StudentShape(2, 64, 96)), ("balance", "lost", "refund")
    )
    save_classifier(classifier, first)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (first / name).write_bytes((whole / name).read_bytes())
    small = pruned(first, tmp_path / "small", closed=True, channels=0.5, sparsity={"method": "wanda", "pattern": "2:4"})
    draft = make_draft(tmp_path)
    train_classifier_student(
        toy_dataset(tmp_path / "data"),
        small,
        StudentConfig(),
        None,
        TRAIN.model_copy(update={"epochs": 6, "learning_rate": 2e-3}),
        0,
        draft,
        start=small,
    )
    assert draft.metrics["validation_accuracy"] > 0.9
    before, after = load_classifier(small).state_dict(), load_classifier(draft.path).state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "proj" in name:
            assert torch.equal(after[name] == 0, weight == 0), name
            assert float((weight == 0).float().mean()) == pytest.approx(0.5)
    tokenizers = [open_tokenizer(folder / "tokenizer.json") for folder in (small, draft.path)]
    assert tokenizers[0].encode("my card").ids == tokenizers[1].encode("my card").ids


def test_zeros_stay_under_adam_with_decay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    first, last = model[0].weight, model[2].weight
    with torch.no_grad():
        first.view(-1)[::3] = 0
        last.view(-1)[0] = 0  # a single zero is no pattern
    zeros = first == 0
    assert keep_zeros(model) == int(zeros.sum())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
    assert torch.equal(first == 0, zeros)
    assert last.view(-1)[0] != 0


def test_distill_config_is_the_students_unless_told() -> None:
    from slmops.pipeline.prune import closed_lessons
    from slmops.recipe import parse_recipe

    recipe = parse_recipe(
        {"name": "x", "task": "classification", "data": {"train": "x.csv"}, "distill": {"temperature": 3}}
    )
    assert closed_lessons(recipe, RecoverConfig()) == recipe.distill
    own = closed_lessons(recipe, RecoverConfig(losses=LossWeights(gold=1, forward_kl=0)))
    assert own == DistillConfig(temperature=3, losses=LossWeights(gold=1, forward_kl=0))
