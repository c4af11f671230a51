"""Signals in a whole recipe: which stages it takes, several teachers, and what is refused before work starts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
from pipeline_helpers import Place, write_rows
from safetensors.torch import load_file

from slmops.errors import ModelError, RecipeError, UsageError
from slmops.pipeline import run_recipe
from slmops.pipeline.context import Context
from slmops.pipeline.teach import (
    ask_for_answers,
    check_engines,
    check_signals,
    impossible_signals,
    make_student,
    make_teacher,
    prepare_data,
)
from slmops.progress import ignore
from slmops.recipe import LoraConfig, Recipe, StudentConfig, TrainConfig, load_recipe, parse_recipe, portable_recipe
from slmops.runtime import open_classifier
from slmops.store import Store


def open_recipe(place: Place, **sections: Any) -> Recipe:
    """The label as an answer in words: an open task of a table that is there."""
    short = {"epochs": 1, "batch_size": 8, "precision": "fp32", "max_tokens": 128}
    raw = place.raw(task="generation", student={"layers": 1, "hidden_size": None}, train=short, **sections)
    raw["teacher"] = {"adapt": False, **raw["teacher"], **sections.get("teacher", {})}
    return parse_recipe(raw)


def context_of(recipe: Recipe, store: Store) -> Context:
    return Context(recipe, store, False, ignore)


def test_token_signals_are_a_stage_that_is_found_again(place: Place, tmp_path: Path) -> None:
    teacher_of = {"adapt": False, "adapt_epochs": 1}
    distill = {"losses": {"gold": 0.5, "jsd": 1}, "top_k": 8}
    with Store.open(tmp_path) as store:
        context = context_of(open_recipe(place, distill=distill, teacher=teacher_of), store)
        check_signals(context)
        data = prepare_data(context)
        teacher = make_teacher(context, data)
        student = make_student(context, "student", data, taught=True, teacher=teacher, data=data)
        [signals] = (store.root / "artifacts" / "signals").iterdir()
        assert (signals / "token_signals.json").exists()
        # Other weights, same signals: the teacher is not asked again.
        distill = {"losses": {"gold": 0.5, "reverse_kl": 1}, "top_k": 8}
        context = context_of(open_recipe(place, distill=distill, teacher=teacher_of), store)
        other = make_student(context, "student", data, taught=True, teacher=teacher, data=data)
        assert other.digest != student.digest
        assert list((store.root / "artifacts" / "signals").iterdir()) == [signals]
        # A recipe that wants no signals keeps none.
        context = context_of(open_recipe(place, teacher=teacher_of), store)
        make_student(context, "student", data, taught=True, teacher=teacher, data=data)
        assert list((store.root / "artifacts" / "signals").iterdir()) == [signals]


def test_two_teachers_of_labels(place: Place, tmp_path: Path) -> None:
    """A second one is adapted and asked too, and changes the student."""
    second = {"model": str(place.teacher), "adapt_epochs": 1, "learning_rate": 5e-4}
    raw = place.raw(train={"epochs": 1})
    raw["teacher"] = [{**raw["teacher"], "adapt_epochs": 1}, second]
    students = []
    with Store.open(tmp_path) as store:
        for teachers in (raw["teacher"], raw["teacher"][:1]):
            context = context_of(parse_recipe({**raw, "teacher": teachers}), store)
            data = prepare_data(context)
            answers = ask_for_answers(context, data, make_teacher(context, data))
            students.append(make_student(context, "student", answers, taught=True, data=data))
    assert students[0].digest != students[1].digest
    assert len([name for name in students[0].manifest.inputs if name.startswith("answers")]) == 2


def test_a_linear_teacher_and_the_student_itself_beside_a_language_model(place: Place, tmp_path: Path) -> None:
    raw = place.raw(train={"epochs": 1})
    raw["teacher"] = [{**raw["teacher"], "adapt_epochs": 1}, {"model": "linear"}, {"model": "untaught"}]
    with Store.open(tmp_path) as store:
        context = context_of(parse_recipe(raw), store)
        data = prepare_data(context)
        linear = make_teacher(context, data, 2)
        assert linear is not None
        rows = [row for row in data.rows("validation") if row.target]
        model = open_classifier(linear.path)
        probabilities = model.probabilities([row.text for row in rows])
        right = sum(model.labels[row.argmax()] == rows[at].target for at, row in enumerate(probabilities))
        assert right / len(rows) == linear.manifest.metrics["validation_accuracy"] > 0.5
        answers = ask_for_answers(context, data, make_teacher(context, data))
        student = make_student(context, "student", answers, taught=True, data=data)
        untaught = make_student(context, "untaught", data, taught=False)
        third = ask_for_answers(context, data, make_teacher(context, data, 3), 3)
    assert {"answers", "answers-2", "answers-3"} <= student.manifest.inputs.keys()
    assert third.manifest.inputs["teacher"] == untaught.digest


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher": {"model": "linear"}}, "first teacher has to be a language model"),
        ({"teacher": {"model": "untaught"}}, "first teacher has to be a language model"),
        ({"task": "generation", "teachers": [{"model": "linear"}]}, "knows labels alone"),
    ],
)
def test_where_a_linear_teacher_cannot_teach(place: Place, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**place.raw(), **more})


@pytest.mark.parametrize(
    "distill",
    [
        {"losses": {"gold": 0.5, "forward_kl": 1}, "top_k": 8},
        {"losses": {"gold": 0.5, "reverse_kl": 1}, "on_policy_share": 0.5, "on_policy_tokens": 4},
    ],
    ids=["signals", "on policy"],
)
def test_a_named_student_is_taught_whole(place: Place, tmp_path: Path, distill: dict[str, Any]) -> None:
    recipe = open_recipe(place, distill=distill)
    named = recipe.model_copy(update={"student": StudentConfig(model=str(place.teacher))})
    with Store.open(tmp_path) as store:
        context = context_of(named, store)
        check_signals(context)
        data = prepare_data(context)
        teacher = make_teacher(context, data)
        student = make_student(context, "student", data, taught=True, teacher=teacher, data=data)
        assert student.manifest.metrics["rows_trained"] > 0
        before, after = (load_file(folder / "model.safetensors") for folder in (place.teacher, student.path))
        assert before.keys() == after.keys()
        assert all(before[name].shape == after[name].shape for name in before)
        wanted = named.model_copy(update={"train": TrainConfig(method="bottleneck")})
        with pytest.raises(RecipeError, match=r"train\.method is bottleneck, but a run trains its student whole"):
            run_recipe(wanted, store)


@pytest.mark.parametrize(
    ("method", "distill"),
    [
        ("lora", {"losses": {"gold": 0.5, "forward_kl": 1}, "top_k": 8}),
        ("lora", {"losses": {"gold": 0.5, "hidden": 1}}),
        ("qlora", {"losses": {"gold": 0.5, "hidden": 1}}),
    ],
    ids=["signals", "hidden", "hidden on 4 bits"],
)
def test_a_named_student_is_taught_through_adapters(
    place: Place, tmp_path: Path, method: Literal["lora", "qlora"], distill: dict[str, Any]
) -> None:
    """What is written is the whole model: only the layers' matrices differ from what it started with."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    train = TrainConfig(
        method=method, lora=LoraConfig(rank=2), epochs=1, batch_size=8, precision="fp32", max_tokens=128
    )
    student = StudentConfig(model=str(place.teacher))
    named = open_recipe(place, distill=distill).model_copy(update={"student": student, "train": train})
    with Store.open(tmp_path) as store:
        context = context_of(named, store)
        check_engines(context)
        check_signals(context)
        data = prepare_data(context)
        teacher = make_teacher(context, data)
        student_made = make_student(context, "student", data, taught=True, teacher=teacher, data=data)
        assert student_made.manifest.metrics["method"] == method
        assert not (student_made.path / "adapter").exists()
        before, after = (load_file(folder / "model.safetensors") for folder in (place.teacher, student_made.path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all(".self_attn." in name or ".mlp." in name for name in changed)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraConfig(rank=4096), "train.lora.rank is 4096, but .* its rank is at most"),
        (LoraConfig(targets=("q_proj", "qq")), "train.lora.targets names qq, which is no matrix of a Llama"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_the_teacher_is_adapted(
    place: Place, tmp_path: Path, lora: LoraConfig, said: str
) -> None:
    named = open_recipe(place).model_copy(
        update={"student": StudentConfig(model=str(place.teacher)), "train": TrainConfig(method="lora", lora=lora)}
    )
    with Store.open(tmp_path) as store:
        with pytest.raises(ModelError, match=said):
            run_recipe(named, store)
        assert {path.name for path in (store.root / "artifacts").iterdir()} == {"dataset"}


@pytest.mark.parametrize("sections", [{}, {"student": {"model": None, "layers": 1}}])
def test_adapters_of_a_run_are_for_a_named_student_of_an_open_task(
    place: Place, tmp_path: Path, sections: dict[str, Any]
) -> None:
    wanted = place.raw(train={"method": "lora"}, **sections)
    with Store.open(tmp_path) as store, pytest.raises(RecipeError, match=r"train\.method is lora, but a run") as caught:
        run_recipe(parse_recipe(wanted), store)
    assert "Adapters are for a student.model of an open task" in str(caught.value)


def test_a_list_of_teachers_is_read(tmp_path: Path, place: Place) -> None:
    shutil.copytree(place.teacher, tmp_path / "second")
    write_rows(tmp_path / "rows.csv", 12)
    (tmp_path / "r.yaml").write_text(
        "name: two\ntask: classification\ndata: {train: rows.csv}\n"
        "teacher:\n  - {model: second, adapt_epochs: 1}\n  - {model: second, adapt_epochs: 2}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.teacher.model == str((tmp_path / "second").resolve())
    assert [teacher.adapt_epochs for teacher in recipe.teachers] == [2]
    assert portable_recipe(recipe)["teachers"][0]["model"] == "second"
    (tmp_path / "r.yaml").write_text(
        "name: two\ntask: classification\ndata: {train: rows.csv}\nteacher:\n  - {model: second}\n  - {modell: x}\n"
    )
    with pytest.raises(RecipeError, match="modell"):
        load_recipe(tmp_path / "r.yaml")


# --- refused ----------------------------------------------------------------------------------------------------

OLIVE = {"engine": "olive", "precision": "auto"}
SERVER = {"model": "openai:x", "base_url": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    ("task", "sections", "message"),
    [
        ("classification", {"distill": {"losses": {"attention": 1}}}, "attention is 1.0, but it compares tokens"),
        ("classification", {"distill": {"losses": {"uld": 1}}}, "uld is 1.0"),
        ("classification", {"distill": {"on_policy_share": 0.5}}, "on_policy_share is for open tasks"),
        ("classification", {"distill": {"layer_map": {0: 0}}}, "layer_map is for open tasks"),
        ("classification", {"teacher": SERVER, "distill": {"losses": {"hidden": 1}}}, "does not show its hidden"),
        ("classification", {"teachers": [SERVER]}, "one of them is behind a server"),
        ("qa", {"distill": {"losses": {"gold": 0}}}, "nothing would be learnt"),
        ("qa", {"teacher": SERVER, "distill": {"losses": {"forward_kl": 1}}}, "does not show what it thinks"),
        ("qa", {"distill": {"on_policy_share": 0.5}}, "no loss judges"),
        ("qa", {"distill": {"losses": {"uld": 1, "hidden": 1}}}, "uld reads what the teacher left"),
        ("qa", {"teachers": [{}]}, "what they left on disk alone"),
        ("qa", {"train": OLIVE, "student": {"model": "x"}, "distill": {"losses": {"jsd": 1}}}, "engine is olive"),
        ("qa", {"train": OLIVE, "student": {"model": "x"}, "distill": {"losses": {"hidden": 1}}}, "engine is olive"),
    ],
)
def test_signals_that_cannot_be_had(place: Place, task: str, sections: dict[str, Any], message: str) -> None:
    problem = impossible_signals(parse_recipe(place.raw(task=task, **sections)))
    assert problem is not None
    assert message in str(problem)
    assert impossible_signals(place.recipe()) is None


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"losses": {"gold": 0, "forward_kl": 0, "hidden": 0}}, "all weights are 0"),
        ({"jsd_beta": 1.0}, "jsd_beta is 1.0"),
        ({"top_k": 50}, "top_k is 50"),
        ({"on_policy_share": 1.5}, "on_policy_share is 1.5"),
        ({"losses": {"reversed_kl": 1}}, "Unknown key"),
    ],
)
def test_values_that_mean_nothing(place: Place, distill: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(place.raw(distill=distill))


def test_layers_and_vocabularies_are_checked_before_work(place: Place, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        recipe = open_recipe(place, distill={"losses": {"hidden": 1}, "layer_map": {1: 0}})
        with pytest.raises(UsageError, match="the student has 1 layers"):
            check_signals(context_of(recipe, store))
        other = tmp_path / "other"
        shutil.copytree(place.teacher, other)
        text = (other / "tokenizer.json").read_text()
        changed = re.sub(r'("add_prefix_space": ?)false', r"\1true", text)
        assert changed != text
        (other / "tokenizer.json").write_text(changed)
        recipe = open_recipe(place, distill={"losses": {"forward_kl": 1}})
        recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": str(other)})})
        with pytest.raises(RecipeError, match=r"forward_kl compares token by token.* not the student's") as caught:
            check_signals(context_of(recipe, store))
        assert "uld" in (caught.value.remedy or "")
        assert list((tmp_path / "store" / "artifacts").glob("*/*")) == []
