"""From feedback to a candidate: a label that the version in use has never seen, some corrections that are wrong."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_helpers import FILLER, WORDS_OF, Place, write_rows

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Bundle, Checkpoint, Dataset
from slmops.errors import ArtifactError, DataError, UsageError
from slmops.package import verify_bundle
from slmops.pipeline import run_recipe
from slmops.pipeline.improve import ImproveResult, improve_recipe, settle
from slmops.progress import Progress
from slmops.rollout import Policy
from slmops.runtime import open_classifier
from slmops.serve.candidate.book import Book, pair_name
from slmops.store import Store

NEW = "refund"


def write_corrections(path: Path, count: int = 30, wrong: int = 4) -> None:
    """Texts of the missing label with that label, and some that are said to be of it and are not."""
    rng = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count + wrong):
            label = NEW if number < count else "lost"
            words = [*WORDS_OF[label].split(), *rng.sample(FILLER, 3)]
            rng.shuffle(words)
            file.write(json.dumps({"text": " ".join(words), "label": NEW}) + "\n")


@dataclass(frozen=True)
class Improved:
    place: Place
    store: Path
    feedback: Path
    result: ImproveResult

    def recipe(self, **sections: Any) -> Any:
        return self.place.recipe(**{**SECTIONS, **sections})


SECTIONS: dict[str, Any] = {
    "evaluate": {"latency_requests": 10, "threads": 1, "untaught_baseline": False},
    "compress": {"precisions": ["fp32"], "teacher_precisions": []},
    "improve": {"old_loss_points": 10},
}


@pytest.fixture(scope="module")
def improved(tmp_path_factory: pytest.TempPathFactory) -> Improved:
    """Read only: copy the store before anything is changed in it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("improve")
    write_tiny_llama(folder / "teacher")
    write_rows(folder / "all.csv", 120)
    lines = (folder / "all.csv").read_text().splitlines(keepends=True)
    (folder / "rows.csv").write_text("".join(line for line in lines if not line.rstrip().endswith(f",{NEW}")))
    write_corrections(folder / "feedback.jsonl")
    place = Place(folder)
    with Store.open(folder / "store") as store:
        recipe = place.recipe(**SECTIONS)
        assert run_recipe(recipe, store).passed
        result = improve_recipe(recipe, store, [folder / "feedback.jsonl"])
    return Improved(place, folder / "store", folder / "feedback.jsonl", result)


@pytest.fixture
def copied(improved: Improved, tmp_path: Path) -> Path:
    shutil.copytree(improved.store, tmp_path / "store")
    return tmp_path / "store"


def improve(
    improved: Improved, root: Path, feedback: Path | None = None, **sections: Any
) -> tuple[ImproveResult, set[str]]:
    """Improve, and the stages that were found done."""
    events: list[Progress] = []
    with Store.open(root) as store:
        chosen = [feedback or improved.feedback]
        result = improve_recipe(improved.recipe(**sections), store, chosen, progress=events.append)
    return result, {event.task for event in events if event.note == "done before"}


def test_a_candidate_knows_the_new_label_and_the_old_ones(improved: Improved) -> None:
    result = improved.result
    assert result.passed, result.content["verdict"]
    assert result.bundle is not None
    assert verify_bundle(result.bundle.path) == []
    classifier = open_classifier(result.bundle.model_path)
    assert classifier.labels == ("balance", "lost", NEW)
    best = classifier.probabilities(["I want a refund for the fee now", "my card is lost and I want a new card"])
    assert [classifier.labels[index] for index in best.argmax(axis=1)] == [NEW, "lost"]
    classifier.close()
    content = json.loads((result.folder / "improvement.json").read_text())
    assert content == result.content
    gates = {gate["name"]: gate for gate in content["gates"]}
    assert set(gates) == {"old_rows", "new_rows", "new_labels"}
    assert gates["old_rows"]["test"]["rows"] == content["scores"]["old_rows"]["rows"] > 5
    assert content["scores"]["new_labels"]["before"] == 0.0
    assert content["scores"]["new_labels"]["after"] >= 0.5
    assert content["corrections"]["new_labels"] == [NEW]
    assert content["corrections"]["corrections"] == 34


def test_the_version_in_use_is_left_alone(improved: Improved) -> None:
    bundle = Bundle.open(improved.store / "runs" / "tiny" / "bundle")
    assert bundle.description["labels"] == ["balance", "lost"]
    assert bundle.digest == improved.result.content["old"]


def test_old_test_rows_judge_and_are_not_learnt(improved: Improved) -> None:
    with Store.open(improved.store) as store:
        lineage = store.trace(improved.result.bundle)  # type: ignore[arg-type]
        names = {node.name: node for node in lineage.ancestors}
        old, new = (Dataset.open(improved.store / str(names[name].path)) for name in ("data", "improved-data"))
        before, after = ({row.text: row.target for row in one.rows("test")} for one in (old, new))
        assert before.items() <= after.items()
        assert {row.text for row in new.rows("train")}.isdisjoint(after)
        assert sum("feedback-" in row.id for row in new.rows("test")) >= 5


def test_the_lineage_leads_to_the_feedback(improved: Improved) -> None:
    with Store.open(improved.store) as store:
        lineage = store.trace(improved.result.bundle)  # type: ignore[arg-type]
    [source] = [node for node in lineage.sources if node.name == "feedback"]
    import hashlib

    assert source.digest == hashlib.sha256(improved.feedback.read_bytes()).hexdigest()


def test_the_student_goes_on_from_the_one_in_use_unless_it_is_to_be_another(improved: Improved, copied: Path) -> None:
    def students(root: Path) -> list[Checkpoint]:
        paths = (root / "artifacts/checkpoint").glob("*/manifest.json")
        return [one for path in paths if "answers" in (one := Checkpoint.open(path.parent)).manifest.inputs]

    first, second = sorted(students(copied), key=lambda one: len(one.manifest.inputs))
    assert second.manifest.inputs["start"] == first.digest
    improve(improved, copied, improve={"old_loss_points": 100, "new_label_score": 0, "go_on": False})
    improve(improved, copied, student={"layers": 2, "hidden_size": 64})
    fresh = [one for one in students(copied) if one.digest not in (first.digest, second.digest)]
    assert len(fresh) == 2
    assert not any("start" in one.manifest.inputs for one in fresh)


def test_again_does_nothing(improved: Improved, copied: Path) -> None:
    result, found = improve(improved, copied)
    assert result.reused
    assert {"improved-data", "student", "report", "bundle", "improvement"} <= found
    assert result.content["gates"] == improved.result.content["gates"]


def test_a_refusal_says_why_and_leaves_no_candidate(improved: Improved, copied: Path) -> None:
    assert (copied / "runs/tiny/candidate/bundle").is_dir()
    result, found = improve(improved, copied, gates={"retention": 9.0, "format_valid": 0.5, "parity": 0.9})
    assert not result.passed
    assert result.bundle is None
    assert "retention" in result.content["verdict"]
    assert not (copied / "runs/tiny/candidate/bundle").exists()
    assert {"improved-data", "student"} <= found
    with Store.open(copied) as store:
        assert store.runs()[0].outcome == "refused"


def test_a_candidate_that_took_over_is_what_the_next_round_begins_with(improved: Improved, copied: Path) -> None:
    runs = copied / "runs" / "tiny"
    old, new = (Bundle.open(path).digest for path in (runs / "bundle", runs / "candidate" / "bundle"))
    book = Book(runs / "candidate" / "rollout" / pair_name(old, new))
    assert not settle(runs)
    state = book.begin(old, new, Policy())
    assert not settle(runs)
    book.note(state, "over", {"step": "50 %"})
    with Store.open(copied) as store:
        data = next(node for node in store.trace(store.find(new)).ancestors if node.name == "improved-data")
    with pytest.raises(DataError, match="say what the rows say already"):
        improve(improved, copied, feedback=copied / str(data.path))
    assert Bundle.open(runs / "bundle").digest == new
    assert verify_bundle(runs / "bundle") == []


def test_a_data_set_of_the_store_is_feedback_too(improved: Improved, copied: Path) -> None:
    with Store.open(copied) as store:
        [data] = [n for n in store.trace(store.find(improved.result.content["new"])).ancestors if n.name == "data"]
        path = copied / str(data.path)
    with pytest.raises(DataError, match="say what the rows say already"):
        improve(improved, copied, feedback=path)


def test_what_is_missing_is_named(improved: Improved, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        improve(improved, copied, feedback=tmp_path / "nothing.jsonl")
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(DataError, match="None of its rows can be used"):
        improve(improved, copied, feedback=tmp_path / "other.jsonl")
    with Store.open(copied) as store:
        with pytest.raises(UsageError, match="No feedback"):
            improve_recipe(improved.recipe(), store, [])
        with pytest.raises(ArtifactError, match="no bundle in use"):
            improve_recipe(improved.recipe(name="other"), store, [improved.feedback])
    deployed = improved.store / "runs" / "tiny" / "bundle"
    with Store.open(tmp_path / "empty") as store, pytest.raises(DataError, match="are not in"):
        improve_recipe(improved.recipe(), store, [improved.feedback], deployed=deployed)
