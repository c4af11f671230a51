"""``distill.unlabelled`` in a recipe: its texts reach the student, and it is refused where it teaches no one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_helpers import Place, write_rows

from slmops.artifacts import Dataset
from slmops.errors import DataError, RecipeError
from slmops.pipeline import distill_recipe, run_recipe
from slmops.pipeline.azureml.job import travelling_recipe, uploads_of
from slmops.pipeline.context import Context
from slmops.pipeline.teach import impossible_signals, make_student, make_teacher, prepare_data
from slmops.progress import Progress, ignore
from slmops.recipe import Recipe, load_recipe, portable_recipe
from slmops.store import Store

FRESH = ["is the fee for my account now", "where is a card that is lost today"]


def write_texts(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def recipe_of(place: Place, path: Path, **sections: Any) -> Recipe:
    short: dict[str, Any] = {
        "teacher": {"adapt_epochs": 1},
        "train": {"epochs": 1},
        "data": {"near_duplicates": None},
        "distill": {"unlabelled": str(path)},
    }
    return place.recipe(**{**short, **sections})


def lessons(answers: Dataset) -> list[str]:
    return [json.loads(line)["text"] for line in (answers.path / "transfer.jsonl").read_text("utf-8").splitlines()]


def test_the_texts_are_labelled_and_learnt_and_a_changed_file_is_asked_again(place: Place, tmp_path: Path) -> None:
    rows = (place.folder / "rows.csv").read_text("utf-8").splitlines()
    known = [line.rpartition(",")[0] for line in rows[1:]]
    path = write_texts(tmp_path / "more.jsonl", known[0], FRESH[0], known[-1].upper())
    recipe = recipe_of(place, path)
    with Store.open(tmp_path / "store") as store:
        answers, reused = distill_recipe(recipe, store)
        assert not reused
        assert lessons(answers) == FRESH[:1], "a text of any split is no further text"
        said = np.load(answers.path / "teacher_transfer.npy")
        assert said.shape == (1, 3)
        np.testing.assert_allclose(np.exp(said).sum(axis=1), 1, rtol=1e-4)
        student = make_student(Context(recipe, store, False, ignore), "student", answers, taught=True)
        assert student.manifest.metrics["parameters"] > 0
        again, reused = distill_recipe(recipe, store)
        assert reused
        assert again.digest == answers.digest
        write_texts(path, *FRESH)
        changed, reused = distill_recipe(recipe, store)
        assert not reused
        assert lessons(changed) == FRESH
        assert changed.manifest.inputs["teacher"] == answers.manifest.inputs["teacher"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": "qa"}, "the teacher of qa does not give its distribution"),
        (
            {"teacher": {"model": "openai:x", "base_url": "http://127.0.0.1:9/v1"}},
            "a teacher behind a server does not give its distribution",
        ),
    ],
)
def test_who_has_no_distribution_over_labels_labels_none(
    place: Place, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    recipe = recipe_of(place, write_texts(tmp_path / "more.jsonl", *FRESH), **sections)
    problem = impossible_signals(recipe)
    assert problem is not None
    assert message in str(problem)
    with Store.open(tmp_path / "store") as store, pytest.raises(RecipeError, match=message):
        run_recipe(recipe, store)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "There is no file"), ('{"texts": "a"}\n', "There is no column 'text'")]
)
def test_a_wrong_file_is_told_before_a_teacher_is_trained(
    place: Place, tmp_path: Path, content: str | None, message: str
) -> None:
    path, events = tmp_path / "more.jsonl", list[Progress]()
    if content is not None:
        path.write_text(content)
    with Store.open(tmp_path / "store") as store:
        for do in (distill_recipe, run_recipe):
            with pytest.raises(DataError, match=message):
                do(recipe_of(place, path), store, progress=events.append)  # type: ignore[operator]
    assert "teacher" not in {event.task for event in events}


def test_where_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the recipe; ``--set`` means the working directory; what leaves the machine has the bare name."""
    folder = tmp_path / "project"
    folder.mkdir()
    write_rows(folder / "rows.csv", 12)
    (folder / "r.yaml").write_text(
        "name: few\ntask: classification\ndata: {train: rows.csv}\ndistill: {unlabelled: deep/more.jsonl}\n"
    )
    recipe = load_recipe(folder / "r.yaml")
    assert recipe.distill.unlabelled == str((folder / "deep/more.jsonl").resolve())
    assert portable_recipe(recipe)["distill"]["unlabelled"] == "more.jsonl"
    assert uploads_of(recipe)["unlabelled"] == ("distill.unlabelled", (folder / "deep/more.jsonl").resolve())
    assert travelling_recipe(recipe)["distill"]["unlabelled"] == "more.jsonl"
    monkeypatch.chdir(tmp_path)
    other = load_recipe(folder / "r.yaml", ["distill.unlabelled=here.jsonl"])
    assert other.distill.unlabelled == str((tmp_path / "here.jsonl").resolve())
    assert load_recipe(folder / "r.yaml", ["distill.unlabelled=null"]).distill.unlabelled is None
    hub = load_recipe(folder / "r.yaml", ["distill.unlabelled=hf:a/b@main:train"])
    assert portable_recipe(hub)["distill"]["unlabelled"] == "hf:a/b@main:train"


def test_a_teacher_reads_the_texts_before_it_is_adapted(place: Place, tmp_path: Path) -> None:
    """It is the adapted teacher's base then; a changed file is read again, and no text of the test rows is read."""
    path = write_texts(tmp_path / "more.jsonl", *FRESH)
    recipe = recipe_of(place, path, teacher={"adapt_epochs": 1, "adapt_text_epochs": 20})
    with Store.open(tmp_path / "store") as store:
        data = prepare_data(Context(recipe, store, False, ignore))
        plain = make_teacher(Context(recipe_of(place, path), store, False, ignore), data)
        teacher = make_teacher(Context(recipe, store, False, ignore), data)
        assert plain is not None
        assert teacher is not None
        assert teacher.manifest.inputs["model"] != plain.manifest.inputs["model"]
        reader = store.find(teacher.manifest.inputs["model"])
        metrics = reader.manifest.metrics
        assert metrics["documents_trained"] == len([*data.rows("train")]) + len(FRESH)
        assert metrics["perplexity_after"] < metrics["perplexity_before"]
        again = make_teacher(Context(recipe, store, False, ignore), data)
        assert again is not None
        assert again.digest == teacher.digest
        write_texts(path, FRESH[0])
        fewer = make_teacher(Context(recipe, store, False, ignore), data)
        assert fewer is not None
        assert fewer.manifest.inputs["model"] != teacher.manifest.inputs["model"]


@pytest.mark.parametrize("teacher", [{"adapt": False}, {"model": "linear"}, {"model": "openai:big"}])
def test_a_teacher_that_is_not_trained_here_reads_nothing(place: Place, teacher: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"teacher\.adapt_text_epochs is 1"):
        place.recipe(privacy="remote", teacher={"adapt_text_epochs": 1, **teacher})
