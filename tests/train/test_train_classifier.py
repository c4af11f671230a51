"""Classifiers: an adapted teacher, a student that follows its teacher, and what is on disk in the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_helpers import WORDS_OF, make_dataset, make_draft, toy_dataset, toy_rows

from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.errors import DataError, ModelError
from slmops.models.classifier import classifier_from_language_model, load_classifier
from slmops.progress import Progress
from slmops.recipe import DistillConfig, LossWeights, StudentConfig, TeacherConfig, TrainConfig
from slmops.runtime import StatefulClassifier, open_classifier
from slmops.train import adapt_classifier, train_classifier_student
from slmops.train.classifier.common import closing_tokenizer
from slmops.train.classifier.signals import TeacherSignals
from slmops.train.classifier.student import _TokenObjective, student_shape
from slmops.train.classifier.teacher import lower_states, split_at
from slmops.train.tokens import pad

LABELS = tuple(sorted(WORDS_OF))
FP32 = TrainConfig(precision="fp32", batch_size=8, epochs=12)
NARROW = StudentConfig(layers=1, hidden_size=64)


def accuracy(folder: Path, rows: Sequence[Row]) -> float:
    classifier = open_classifier(folder)
    found = classifier.probabilities([row.text for row in rows]).argmax(axis=1)
    classifier.close()
    return float(np.mean([classifier.labels[index] == row.target for index, row in zip(found, rows, strict=True)]))


def adapt(llama: Path, dataset: Dataset, draft: Draft, *, progress: Any = None, **teacher: Any) -> None:
    config = TeacherConfig(**{"adapt_epochs": 6, "frozen_share": 0.5, "learning_rate": 1e-3, **teacher})
    sinks = {} if progress is None else {"progress": progress}
    adapt_classifier(llama, dataset, config, FP32, 0, draft, **sinks)


# --- two halves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_two_halves_are_the_whole(llama: Path, layer: int) -> None:
    classifier = classifier_from_language_model(llama, LABELS).eval()
    lower, upper = split_at(classifier, layer)
    upper.eval()
    ids, mask = pad([[1, 20, 30, 40, 50], [7, 8], [9]])
    with torch.no_grad():
        whole = classifier(ids, mask)
        states = lower(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        assert torch.equal(upper(inputs_embeds=states, attention_mask=mask), whole)
    assert whole.shape == (3, 3)


def test_halves_share_the_weights_and_the_lower_is_frozen(llama: Path) -> None:
    classifier: Any = classifier_from_language_model(llama, LABELS)
    lower, upper = split_at(classifier, 1)
    trained = {id(parameter) for parameter in upper.parameters() if parameter.requires_grad}
    layers = classifier.backbone.layers
    assert {id(parameter) for parameter in layers[1].parameters()} <= trained
    assert id(classifier.backbone.norm.weight) in trained
    assert id(classifier.head.weight) in trained
    frozen = {id(parameter) for parameter in lower.parameters()}
    assert frozen.isdisjoint(trained)
    assert {id(parameter) for parameter in layers[0].parameters()} <= frozen
    assert not any(parameter.requires_grad for parameter in lower.parameters())
    # The whole is as it was: both halves are views.
    assert len(layers) == classifier.backbone.config.num_hidden_layers == 2
    with torch.no_grad():
        next(iter(upper.backbone.layers[0].parameters())).zero_()
    assert next(iter(layers[1].parameters())).abs().max() == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lower_states_are_those_of_each_text_alone(llama: Path, precision: str) -> None:
    """In the order given, whatever was batched with what, and without padding."""
    classifier: Any = classifier_from_language_model(llama, LABELS).eval()
    lower, _ = split_at(classifier, 1)
    random = np.random.default_rng(0)
    tokens = [random.integers(3, 299, size=length).tolist() for length in (9, 1, 4, 7, 2, 9, 3)]
    events: list[Progress] = []
    found = lower_states(lower, tokens, precision, "train", events.append)
    assert [tuple(states.shape) for states in found] == [(len(ids), 64) for ids in tokens]
    assert {states.dtype for states in found} == {torch.bfloat16}
    assert (events[-1].done, events[-1].total) == (7, 7)
    for ids, states in zip(tokens, found, strict=True):
        with torch.no_grad():
            alone = classifier.backbone(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        scale = alone.abs().max()
        assert (states.float() - alone).abs().max() < (0.005 if precision == "fp32" else 0.05) * scale


# --- the teacher ------------------------------------------------------------------------------------------------


def test_adapt_learns_a_task_far_above_chance(llama: Path, tmp_path: Path) -> None:
    dataset, draft, events = toy_dataset(tmp_path / "data"), make_draft(tmp_path), []
    adapt(llama, dataset, draft, progress=events.append, adapt_epochs=10)
    assert draft.metrics["validation_accuracy"] > 0.85
    assert accuracy(draft.path, toy_rows(60, 99)) > 0.85
    assert {path.name for path in draft.path.iterdir()} == {
        *("config.json", "model.safetensors", "labels.json", "history.json", "tokenizer.json", "tokenizer_config.json")
    }
    assert json.loads((draft.path / "labels.json").read_text()) == list(LABELS)
    history = json.loads((draft.path / "history.json").read_text())
    assert [p["step"] for p in history if "validation_loss" in p] == list(range(6, 61, 6))
    assert {event.task for event in events} == {
        "frozen layers, train",
        "frozen layers, validation",
        "adapt teacher",
    }


def test_adapt_leaves_the_frozen_layers_as_they_were(llama: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    adapt(llama, toy_dataset(tmp_path / "data"), draft, adapt_epochs=1)
    before, after = load_file(llama / "model.safetensors"), load_file(draft.path / "model.safetensors")
    renamed = {name.replace("model.", "backbone."): tensor for name, tensor in before.items() if "lm_head" not in name}
    assert renamed.keys() | {"head.weight", "head.bias"} == after.keys()
    changed = {name for name, tensor in renamed.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in renamed if "layers.1." in name or name == "backbone.norm.weight"}


def test_adapt_with_nothing_frozen_moves_all_layers(llama: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    adapt(llama, toy_dataset(tmp_path / "data"), draft, adapt_epochs=1, frozen_share=0.0)
    before, after = load_file(llama / "model.safetensors"), load_file(draft.path / "model.safetensors")
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["backbone.layers.0.mlp.up_proj.weight"])


def test_what_is_on_disk_is_what_was_validated(llama: Path, tmp_path: Path) -> None:
    """Validation ran over the halves and cached states; the folder holds the whole, read with its own tokenizer."""
    dataset, draft = toy_dataset(tmp_path / "data"), make_draft(tmp_path)
    adapt(llama, dataset, draft)
    rows = list(dataset.rows("validation"))
    assert accuracy(draft.path, rows) == pytest.approx(draft.metrics["validation_accuracy"])
    classifier = open_classifier(draft.path)
    probabilities = classifier.probabilities([row.text for row in rows])
    gold = [LABELS.index(row.target or "") for row in rows]
    loss = -np.log(probabilities[np.arange(len(rows)), gold]).mean()
    assert loss == pytest.approx(draft.metrics["validation_loss"], rel=0.05)  # cached states are bf16


def test_adapting_goes_on_where_it_was_stopped(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slmops.train.loop as loop

    dataset = toy_dataset(tmp_path / "data")
    whole, cut = make_draft(tmp_path / "whole"), make_draft(tmp_path / "cut")
    adapt(llama, dataset, whole, adapt_epochs=2)

    def stop(event: Progress) -> None:
        if event.task == "adapt teacher" and event.done == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop._Watch, "on_step_end", always_save(loop._Watch.on_step_end))
    with pytest.raises(KeyboardInterrupt):
        adapt(llama, dataset, cut, adapt_epochs=2, progress=stop)
    adapt(llama, dataset, make_draft(tmp_path / "cut"), adapt_epochs=2)
    assert sorted(path.name for path in cut.work.rglob("checkpoint-*"))
    for name in ("model.safetensors", "history.json", "tokenizer.json"):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def always_save(on_step_end: Any) -> Any:
    def saving(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        on_step_end(self, args, state, control, **more)
        control.should_save = True

    return saving


# --- the student ------------------------------------------------------------------------------------------------


def answered(
    folder: Path, teacher_labels: Sequence[int], *, transfer: Sequence[tuple[str, int]] = (), train: int = 48
) -> Dataset:
    """The toy data with a teacher that is nearly certain of the labels given, one a training row."""

    def logs(labels: Sequence[int]) -> np.ndarray:
        probabilities = np.full((len(labels), 3), 0.01)
        probabilities[np.arange(len(labels)), list(labels)] = 0.98
        return np.log(probabilities).astype(np.float32)

    plain = toy_dataset(folder.with_name(folder.name + "-plain"), train=train)
    shutil.copytree(plain.path, folder)
    np.save(folder / "teacher_train.npy", logs(teacher_labels))
    if transfer:
        lines = [json.dumps({"text": text}) + "\n" for text, _ in transfer]
        (folder / "transfer.jsonl").write_text("".join(lines))
        np.save(folder / "teacher_transfer.npy", logs([label for _, label in transfer]))
    return Dataset.open(folder)


def gold(rows: Sequence[Row]) -> list[int]:
    return [LABELS.index(row.target or "") for row in rows]


def student(dataset: Dataset, llama: Path, draft: Draft, distill: DistillConfig | None, **more: Any) -> None:
    config, train = more.pop("student", NARROW), more.pop("train", FP32)
    train_classifier_student(dataset, llama, config, distill, train, 0, draft, **more)


def test_a_student_learns_what_the_teacher_says_not_what_is_gold(llama: Path, tmp_path: Path) -> None:
    """Full weight on the teacher, which has every label one further on: so has the student."""
    shifted = [(label + 1) % 3 for label in gold(toy_rows(48, 0))]
    draft = make_draft(tmp_path)
    student(answered(tmp_path / "data", shifted), llama, draft, DistillConfig(losses=LossWeights(gold=0, forward_kl=1)))
    rows = toy_rows(60, 98)
    assert accuracy(draft.path, rows) < 0.1
    moved = [Row(r.id, r.messages, LABELS[(LABELS.index(r.target or "") + 1) % 3]) for r in rows]
    assert accuracy(draft.path, moved) > 0.9


def test_without_distillation_the_teachers_files_do_not_matter(llama: Path, tmp_path: Path) -> None:
    shifted = [(label + 1) % 3 for label in gold(toy_rows(48, 0))]
    drafts = [make_draft(tmp_path / name) for name in "ab"]
    transfer = [("tell me where it is", 0)]
    student(answered(tmp_path / "data-a", shifted, transfer=transfer), llama, drafts[0], None)
    student(toy_dataset(tmp_path / "data-b"), llama, drafts[1], None)
    assert accuracy(drafts[0].path, toy_rows(60, 98)) > 0.9
    weights = [load_file(draft.path / "model.safetensors") for draft in drafts]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_transfer_texts_teach_without_gold(llama: Path, tmp_path: Path) -> None:
    """A word that only transfer texts hold is learnt from the teacher; and gold rows keep their own signals."""
    transfer = [(f"zebra {' '.join(row.text.split()[:2])}", 2) for row in toy_rows(24, 5)]
    dataset = answered(tmp_path / "data", gold(toy_rows(48, 0)), transfer=transfer)
    draft = make_draft(tmp_path)
    student(dataset, llama, draft, DistillConfig(), train=TrainConfig(precision="fp32", batch_size=8, epochs=20))
    assert accuracy(draft.path, toy_rows(60, 98)) > 0.9
    assert accuracy(draft.path, [Row("z", (Message("user", "zebra how are"),), LABELS[2])]) == 1.0


def test_student_and_untaught_twin_are_the_same_net(llama: Path, tmp_path: Path) -> None:
    """The vocabulary comes from the labelled rows alone, so that the comparison is fair."""
    dataset = answered(tmp_path / "data", gold(toy_rows(48, 0)), transfer=[("ein Zebra für 1234 €", 0)])
    drafts = [make_draft(tmp_path / name) for name in "ab"]
    for draft, distill in zip(drafts, (DistillConfig(), None), strict=True):
        student(dataset, llama, draft, distill, train=TrainConfig(precision="fp32", batch_size=8, epochs=1))
    assert (drafts[0].path / "tokenizer.json").read_bytes() == (drafts[1].path / "tokenizer.json").read_bytes()
    assert drafts[0].metrics["parameters"] == drafts[1].metrics["parameters"]


def test_a_saved_student_gives_the_same_logits(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slmops.train.classifier.common as module

    kept: list[Any] = []
    save = module.save_classifier
    monkeypatch.setattr(module, "save_classifier", lambda model, folder: (kept.append(model), save(model, folder)))
    draft = make_draft(tmp_path)
    student(toy_dataset(tmp_path / "data"), llama, draft, None, train=TrainConfig(precision="fp32", epochs=1))
    again = load_classifier(draft.path)
    ids, mask = pad([[5, 6, 7, 8], [9, 10]])
    with torch.no_grad():
        assert torch.equal(again(ids, mask), kept[0].eval()(ids, mask))
    assert again.parameters_count == draft.metrics["parameters"]


@pytest.mark.parametrize("vocabulary", ["trim", "keep"])
def test_the_vocabulary_is_trimmed_unless_told_otherwise(llama: Path, tmp_path: Path, vocabulary: Any) -> None:
    draft = make_draft(tmp_path)
    config = StudentConfig(layers=1, hidden_size=64, vocabulary=vocabulary)
    student(
        toy_dataset(tmp_path / "data"),
        llama,
        draft,
        None,
        student=config,
        train=TrainConfig(precision="fp32", epochs=1),
    )
    rows = load_file(draft.path / "model.safetensors")["backbone.embed_tokens.weight"].shape[0]
    assert rows == draft.metrics["vocabulary"]
    assert rows == 300 or vocabulary == "trim"
    assert open_classifier(draft.path).probabilities(["Grüße, 東京!", ""]).shape == (2, 3)


def test_a_named_student_starts_from_its_own_weights(llama: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    train = TrainConfig(precision="fp32", batch_size=16, learning_rate=1e-3, epochs=6)
    student(
        toy_dataset(tmp_path / "data"),
        tmp_path / "no teacher is read",
        draft,
        None,
        student=StudentConfig(model="x"),
        train=train,
        named_model=llama,
    )
    assert draft.metrics["vocabulary"] == 300
    assert json.loads((draft.path / "config.json").read_text())["num_hidden_layers"] == 2
    assert accuracy(draft.path, toy_rows(60, 98)) > 0.8


def test_other_labels_keep_what_is_known_of_the_old_ones(llama: Path) -> None:
    classifier = classifier_from_language_model(llama, ("fee", "lost"))
    torch.nn.init.normal_(classifier.head.bias)
    grown = classifier.with_labels(("card", "fee", "lost"))
    ids, mask = pad([[5, 6, 7]])
    before, after = classifier(ids, mask), grown(ids, mask)
    assert after.shape == (1, 3)
    torch.testing.assert_close(after[:, 1:], before)
    assert not grown.head.weight[0].equal(classifier.head.weight[0])


def test_shape_of_a_student() -> None:
    assert student_shape(StudentConfig()).hidden_size == 256
    shape = student_shape(StudentConfig(layers=3, hidden_size=128))
    assert (shape.layers, shape.hidden_size, shape.intermediate_size) == (3, 128, 256)
    assert student_shape(StudentConfig(intermediate_size=77)).intermediate_size == 77


# --- what cannot be used ----------------------------------------------------------------------------------------


def test_no_closed_label_set(llama: Path, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", {"train": toy_rows(3, 0)})
    for work in (
        lambda draft: adapt(llama, dataset, draft),
        lambda draft: student(dataset, llama, draft, None),
    ):
        with pytest.raises(DataError, match="no closed label set"):
            work(make_draft(tmp_path))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": toy_rows(6, 0)}, "The validation split has no rows"),
        ({"validation": toy_rows(6, 0)}, "The train split has no rows"),
        (
            {"train": [Row("r", (Message("user", "hello"),), None)], "validation": toy_rows(3, 0)},
            "No row of the train split has a label",
        ),
    ],
)
def test_splits_that_teach_or_judge_nothing(
    llama: Path, tmp_path: Path, splits: dict[str, list[Row]], message: str
) -> None:
    dataset = make_dataset(tmp_path / "data", splits, ["balance", "lost", "refund"])
    for work in (
        lambda draft: adapt(llama, dataset, draft),
        lambda draft: student(dataset, llama, draft, None),
    ):
        with pytest.raises(DataError, match=message):
            work(make_draft(tmp_path))


@pytest.mark.parametrize("hidden", [None, 0.0, 0.5])
def test_the_loss_is_the_weighted_sum_of_its_signals(llama: Path, tmp_path: Path, hidden: float | None) -> None:
    """States count by their weight; by the default where they were kept; not at all at 0."""
    rows = toy_rows(48, 0)
    dataset = answered(tmp_path / "data", gold(rows), transfer=[("a", 0), ("b", 1)])
    states = np.random.default_rng(0).normal(3, 2, size=(50, 5)).astype(np.float16)
    np.save(dataset.path / "states_train.npy", states[:48])
    np.save(dataset.path / "states_transfer.npy", states[48:])
    signals = TeacherSignals.read(dataset, {"train": 48, "transfer": 2}, 3, states=hidden)
    assert signals.hidden_size == (0 if hidden == 0 else 5)
    config = DistillConfig(temperature=3.0, losses=LossWeights(gold=0.25, forward_kl=0.5, hidden=hidden))
    objective = _TokenObjective([[1, 2]] * 50, [0] * 50, signals, [], [], config)
    batch = objective.collate([49, 7])
    logits, projected = torch.randn(2, 3), torch.randn(2, 5)
    loss = objective.loss(lambda **_: (logits, projected if signals.hidden_size else None), batch)
    teacher = torch.from_numpy(
        np.stack([np.load(dataset.path / "teacher_transfer.npy")[1], np.load(dataset.path / "teacher_train.npy")[7]])
    )
    soft = 9 * (teacher / 3).softmax(1).mul((teacher / 3).log_softmax(1) - (logits / 3).log_softmax(1)).sum() / 2
    expected = 0.25 * -logits.log_softmax(1)[:, 0].mean() + 0.5 * soft
    if hidden != 0:
        known = states[:48].astype(np.float64)
        wanted = (states[[49, 7]] - known.mean(0)) / known.std(0)
        expected += (1.0 if hidden is None else hidden) * ((projected.numpy() - wanted) ** 2).mean()
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)


def test_states_help_where_nothing_else_teaches(llama: Path, tmp_path: Path) -> None:
    """Gold and distribution switched off: what a student learns of the states shows in its own."""
    dataset = answered(tmp_path / "data", gold(toy_rows(48, 0)))
    np.save(dataset.path / "states_train.npy", np.eye(3, dtype=np.float16)[gold(toy_rows(48, 0))])
    draft = make_draft(tmp_path)
    student(dataset, llama, draft, DistillConfig(losses=LossWeights(gold=0, forward_kl=0, hidden=1)))
    rows = toy_rows(60, 98)
    classifier = open_classifier(draft.path)
    assert isinstance(classifier, StatefulClassifier)
    states, _ = classifier.states_and_probabilities([row.text for row in rows])
    centres = np.stack([states[np.array(gold(rows)) == label].mean(0) for label in range(3)])
    nearest = np.linalg.norm(states[:, None] - centres[None], axis=2).argmin(1)
    assert float(np.mean(nearest == gold(rows))) > 0.9
    assert {"projection.weight", "projection.bias"}.isdisjoint(load_file(draft.path / "model.safetensors"))


def test_states_that_were_asked_for_and_not_kept(llama: Path, tmp_path: Path) -> None:
    dataset = answered(tmp_path / "data", gold(toy_rows(48, 0)))
    with pytest.raises(DataError, match=r"states_train\.npy is missing"):
        student(dataset, llama, make_draft(tmp_path), DistillConfig(losses=LossWeights(hidden=1.0)))


def test_missing_signals(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no teacher's signals: teacher_train\.npy is missing"):
        student(toy_dataset(tmp_path / "data"), llama, make_draft(tmp_path), DistillConfig())


def test_signals_of_other_rows(llama: Path, tmp_path: Path) -> None:
    dataset = answered(tmp_path / "data", [0, 1, 2])
    with pytest.raises(DataError, match=r"teacher_train\.npy has 3 rows where the split has 48"):
        student(dataset, llama, make_draft(tmp_path), DistillConfig())


def test_signals_of_another_label_set(llama: Path, tmp_path: Path) -> None:
    dataset = answered(tmp_path / "data", gold(toy_rows(48, 0)))
    np.save(dataset.path / "teacher_train.npy", np.zeros((48, 4), np.float32))
    with pytest.raises(DataError, match=r"teacher_train\.npy has 4 columns where the data set has 3 labels"):
        student(dataset, llama, make_draft(tmp_path), DistillConfig())


def test_a_damaged_signals_file(llama: Path, tmp_path: Path) -> None:
    dataset = answered(tmp_path / "data", gold(toy_rows(48, 0)))
    (dataset.path / "teacher_train.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"teacher_train\.npy cannot be read"):
        student(dataset, llama, make_draft(tmp_path), DistillConfig())


def test_a_rate_that_explodes_names_step_and_remedy(llama: Path, tmp_path: Path) -> None:
    train = TrainConfig(precision="fp32", batch_size=8, epochs=12, learning_rate=1e30)
    with pytest.raises(ModelError, match=r"The loss became (nan|inf) at step \d+") as caught:
        student(toy_dataset(tmp_path / "data"), llama, make_draft(tmp_path), None, train=train)
    assert "Lower the learning rate" in (caught.value.remedy or "")


def test_a_tokenizer_without_configuration(llama: Path, tmp_path: Path) -> None:
    """Only tokenizer.json must be there; without an end token texts are not closed."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert closing_tokenizer(folder).encode("my card").ids == closing_tokenizer(llama).encode("my card").ids[:-1]
    draft = make_draft(tmp_path)
    student(toy_dataset(tmp_path / "data"), folder, draft, None, train=TrainConfig(precision="fp32", epochs=1))
    assert open_classifier(draft.path).labels == LABELS
