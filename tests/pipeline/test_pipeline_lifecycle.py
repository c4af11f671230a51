"""The whole life of a tiny classifier: done once, found done, redone in part, damaged, judged."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Done

from slmops.artifacts import Bundle, Checkpoint, Dataset, Report
from slmops.errors import CorruptArtifactError, ModelError, StorageError
from slmops.evaluate.summary import REQUIRED_KEYS
from slmops.package import verify_bundle
from slmops.pipeline import RunResult, run_recipe
from slmops.pipeline.ship import _licence_texts
from slmops.progress import Progress
from slmops.runtime import open_classifier
from slmops.store import Store

STAGES = {
    *("data", "teacher", "answers", "student", "untaught", "teacher-torch", "student-torch", "student-fp32"),
    *("student-int8", "untaught-torch", "score-teacher-torch", "score-student-torch", "score-student-fp32"),
    *("score-student-int8", "parity-student-fp32", "parity-student-int8", "score-untaught", "measure", "baselines"),
    *("report", "bundle"),
}


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> Path:
    """The finished run's store, for a test of its own."""
    shutil.copytree(done.store, tmp_path / "store")
    return tmp_path / "store"


def run(root: Path, done: Done, out: Path | None = None, **sections: Any) -> tuple[RunResult, set[str]]:
    """Run, and the stages for which anything was done."""
    events: list[Progress] = []
    with Store.open(root) as store:
        result = run_recipe(done.place.recipe(**sections), store, out=out, progress=events.append)
    found = {event.task for event in events if event.note == "done before"}
    return result, STAGES - found


# --- done once --------------------------------------------------------------------------------------------------


def test_the_report_has_what_others_rely_on(done: Done) -> None:
    report = json.loads((done.store / "runs" / "tiny" / "report.json").read_text("utf-8"))
    assert report == done.result.report
    assert set(REQUIRED_KEYS) <= report.keys()
    assert (report["name"], report["task"], report["schema"], report["metric"]) == (
        *("tiny", "classification", 1, "accuracy"),
    )
    for who in ("teacher", "student"):
        entry = report[who]
        assert 0 <= entry["score"]["ci95"][0] <= entry["score"]["value"] <= entry["score"]["ci95"][1] <= 1
        assert entry["score"]["rows"] == report["data"]["rows"]["test"] > 0
        assert entry["parameters"] > 1000
        assert entry["size_bytes"] > 1000
        assert 0 < entry["latency_ms"]["p50"] <= entry["latency_ms"]["p95"]
        assert entry["memory_bytes_peak"] > 1e6
        assert entry["throughput_per_s"] > 0
        assert entry["cost_per_1000"] > 0
    assert report["teacher"]["id"] == "teacher-torch"
    assert {variant["id"] for variant in report["variants"]} == {
        *("teacher-torch", "student-torch", "student-fp32", "student-int8"),
    }
    assert report["student"]["id"] in {"student-fp32", "student-int8"}
    assert set(report["baselines"]) == {"majority", "linear", "untaught"}
    assert report["retention"] == pytest.approx(
        report["student"]["score"]["value"] / report["teacher"]["score"]["value"]
    )
    small, large = report["student"]["size_bytes"], report["teacher"]["size_bytes"]
    assert report["reductions"]["size"] == pytest.approx(1 - small / large)
    assert {gate["name"] for gate in report["gates"]} >= {"retention", "format_valid"}
    assert report["passed"] is all(gate["passed"] for gate in report["gates"])
    assert report["verdict"].endswith(".")
    assert set(report["wall_s"]) == STAGES
    assert set(report["history"]) == {"student", "teacher"}
    assert done.result.passed
    assert not done.result.reused


def test_it_learnt_something(done: Done) -> None:
    """Random weights and 66 rows: far above the 34 % of the largest class."""
    report = done.result.report
    assert report["teacher"]["score"]["value"] > 0.6
    assert report["student"]["score"]["value"] > report["baselines"]["majority"]["score"]["value"] + 0.2


def test_the_page_shows_the_same_numbers(done: Done) -> None:
    page = (done.store / "runs" / "tiny" / "report.html").read_text("utf-8")
    assert done.result.report["verdict"].split(",")[0][:40] in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_licences_beside_model_and_data_go_with_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("Apache License\nVersion 2.0\n")
    (tmp_path / "NOTICE").write_bytes(b"Made by J\xf6rg")
    (tmp_path / "licenses").mkdir()
    assert _licence_texts(tmp_path) == "\nApache License\nVersion 2.0\n\nMade by J\ufffdrg\n"
    assert _licence_texts(tmp_path / "nowhere") == ""


def test_the_bundle_verifies_and_answers(done: Done) -> None:
    folder = done.store / "runs" / "tiny" / "bundle"
    assert done.result.report["bundle"] == str(folder)
    assert verify_bundle(folder) == []
    bundle = Bundle.open(folder)
    assert bundle.digest == done.result.bundle.digest
    classifier = open_classifier(bundle.model_path)
    assert classifier.labels == ("balance", "lost", "refund")
    assert classifier.probabilities(["my card is lost"]).shape == (1, 3)
    classifier.close()


def test_every_stage_is_kept_with_its_origin(done: Done) -> None:
    with Store.open(done.store) as store:
        lineage = store.trace(done.result.bundle)
        assert {"dataset", "checkpoint", "variant", "report", "source"} <= {node.kind for node in lineage.ancestors}
        [entry] = store.runs()
        assert (entry.name, entry.outcome) == ("tiny", "passed")
        assert store.find(entry.report_digest or "").kind == "report"
    assert list((done.store / "work").iterdir()) == []
    assert not list(done.store.rglob("*.tmp"))


def test_each_part_of_the_work_is_shown(done: Done) -> None:
    shown = {event.task for event in done.events}
    assert {"adapt teacher", "student", "untaught", "teacher", "measure", "score student-int8"} <= shown
    assert all(event.total is None or event.done <= event.total for event in done.events)


def test_the_whole_life_takes_less_than_a_minute_of_work(done: Done) -> None:
    """Work, not waiting: other load on the machine does not count against it."""
    assert sum(done.result.report["wall_s"].values()) <= done.wall_s + 1


# --- found done -------------------------------------------------------------------------------------------------


def test_the_second_run_does_nothing(done: Done, copied: Path) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (copied / "artifacts").rglob("*") if path.is_file()}

    before, started = state(), time.process_time()
    result, worked = run(copied, done)
    assert worked == set()
    assert result.reused
    assert time.process_time() - started < 5
    assert state() == before
    report, first = dict(result.report), dict(done.result.report)
    assert report.pop("bundle") == str(copied / "runs" / "tiny" / "bundle")
    first.pop("bundle")
    assert report == first
    with Store.open(copied) as store:
        assert len(store.runs()) == 2


def test_another_folder_gets_all_of_it_without_work(done: Done, copied: Path, tmp_path: Path) -> None:
    result, worked = run(copied, done, out=tmp_path / "a" / "b")
    assert worked == set()
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"report.json", "report.html", "bundle"}
    assert verify_bundle(tmp_path / "a" / "b" / "bundle") == []
    assert result.folder == tmp_path / "a" / "b"


# --- redone in part ---------------------------------------------------------------------------------------------


def test_a_changed_gate_redoes_only_the_report_and_what_follows(done: Done, copied: Path) -> None:
    result, worked = run(copied, done, gates={"retention": 0.2})
    assert worked == {"report", "bundle"}
    assert not result.reused
    [gate] = [gate for gate in result.report["gates"] if gate["name"] == "retention"]
    assert gate["limit"] == 0.2


def test_a_failing_gate_is_told_after_the_report_is_written(done: Done, copied: Path) -> None:
    result, _ = run(copied, done, gates={"retention": 5.0})
    assert not result.passed
    report = json.loads((copied / "runs" / "tiny" / "report.json").read_text())
    assert [gate["name"] for gate in report["gates"] if not gate["passed"]] == ["retention"]
    assert "1 of " in report["verdict"]
    assert verify_bundle(copied / "runs" / "tiny" / "bundle") == []
    with Store.open(copied) as store:
        assert store.runs()[0].outcome == "gate failed"
    again, worked = run(copied, done, gates={"retention": 5.0})
    assert worked == set()
    assert not again.passed


def test_a_budget_that_does_not_hold(done: Done, copied: Path) -> None:
    result, worked = run(copied, done, budget={"size_mb": 0.001, "latency_ms_p95": 1e6})
    assert worked == {"report", "bundle"}
    assert [gate["name"] for gate in result.report["gates"] if not gate["passed"]] == ["size_mb"]


def test_a_chosen_variant_is_the_one_in_the_bundle(done: Done, copied: Path) -> None:
    for precision in ("fp32", "int8"):
        result, worked = run(copied, done, compress={"choose": precision})
        assert worked == {"report", "bundle"}
        assert result.report["student"]["id"] == f"student-{precision}"
        description = json.loads((copied / "runs" / "tiny" / "bundle" / "model" / "slmops.json").read_text())
        assert description["precision"] == precision


def test_another_student_keeps_teacher_and_data(done: Done, copied: Path) -> None:
    _, worked = run(copied, done, train={"epochs": 1}, evaluate={"untaught_baseline": False})
    assert {"data", "teacher", "answers", "teacher-torch", "score-teacher-torch", "baselines"}.isdisjoint(worked)
    assert {"student", "student-int8", "measure", "report", "bundle"} <= worked


# --- damaged ----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))


def forget(root: Path, kind: str, name: str) -> Path:
    """Take a finished stage away, so that it has to be made again out of its inputs."""
    for manifest in (root / "artifacts" / kind).glob("*/manifest.json"):
        if json.loads(manifest.read_text())["name"] == name:
            shutil.rmtree(manifest.parent)
            return manifest.parent
    raise AssertionError(name)


def folder_of(root: Path, kind: str, name: str) -> Path:
    manifests = (root / "artifacts" / kind).glob("*/manifest.json")
    return next(path.parent for path in manifests if json.loads(path.read_text())["name"] == name)


@pytest.mark.parametrize(
    ("kind", "name", "file", "remade"),
    [
        ("dataset", "data", "train.jsonl", ("dataset", "answers")),
        ("checkpoint", "teacher", "model.safetensors", ("dataset", "answers")),
        ("dataset", "answers", "teacher_train.npy", ("checkpoint", "student")),
        ("checkpoint", "student", "model.safetensors", ("variant", "student-int8")),
        ("variant", "student-int8", "model/model.onnx", ("report", "score-student-int8")),
    ],
)
def test_one_flipped_byte_is_named_where_it_is_read(
    done: Done, copied: Path, kind: str, name: str, file: str, remade: tuple[str, str]
) -> None:
    damaged = folder_of(copied, kind, name) / file
    flip(damaged)
    forget(copied, *remade)
    with pytest.raises(CorruptArtifactError) as caught:
        run(copied, done)
    assert str(damaged) in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_is_cut_or_gone_is_named_at_once(done: Done, copied: Path, cut: bool) -> None:
    damaged = folder_of(copied, "checkpoint", "teacher") / "model.safetensors"
    damaged.chmod(0o644)
    if cut:
        with damaged.open("r+b") as file:
            file.truncate(1000)
    else:
        damaged.unlink()
    with pytest.raises(CorruptArtifactError) as caught:
        run(copied, done)
    assert str(damaged) in str(caught.value)


def test_a_damaged_artifact_that_is_deleted_is_made_again(done: Done, copied: Path) -> None:
    shutil.rmtree(folder_of(copied, "checkpoint", "student"))
    result, worked = run(copied, done)
    # The same weights again, so nothing that follows is redone.
    assert worked == {"student"}
    assert result.report["student"]["score"] == done.result.report["student"]["score"]


def test_the_teacher_is_the_same_when_it_is_made_again(done: Done, copied: Path) -> None:
    shutil.rmtree(folder_of(copied, "checkpoint", "teacher"))
    _, worked = run(copied, done)
    assert worked == {"teacher"}


# --- the place of the result ------------------------------------------------------------------------------------


def test_a_bundle_half_copied_by_a_killed_run_is_replaced(done: Done, copied: Path) -> None:
    folder = copied / "runs" / "tiny"
    (folder / "bundle").rename(folder / ".bundle.old")
    (folder / ".bundle.tmp" / "model").mkdir(parents=True)
    (folder / ".bundle.tmp" / "model" / "half").write_text("x")
    run(copied, done)
    assert verify_bundle(folder / "bundle") == []
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html", "bundle"}


def test_a_folder_of_somebody_else_is_not_replaced(done: Done, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    (tmp_path / "out" / "bundle" / "mine.txt").write_text("do not touch")
    with pytest.raises(Exception, match="is not an artifact") as caught:
        run(copied, done, out=tmp_path / "out")
    assert caught.value.remedy  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "bundle" / "mine.txt").read_text() == "do not touch"


def test_a_file_where_the_result_should_go_is_told_before_any_work(done: Done, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Could not put report and bundle into") as caught:
        run(tmp_path / "store", done, out=tmp_path / "file")
    assert "--out" in (caught.value.remedy or "")
    assert not list((tmp_path / "store" / "artifacts").iterdir())


# --- what is made of what ---------------------------------------------------------------------------------------


def test_the_students_signals_are_the_teachers(done: Done) -> None:
    """Row by row: what was kept is what the adapted teacher says of that row."""
    import numpy as np

    answers = Dataset.open(folder_of(done.store, "dataset", "answers"))
    teacher = Checkpoint.open(folder_of(done.store, "checkpoint", "teacher"))
    classifier = open_classifier(teacher.path)
    rows = list(answers.rows("train"))
    expected = np.log(classifier.probabilities([row.text for row in rows]))
    np.testing.assert_allclose(np.load(answers.path / "teacher_train.npy"), expected, atol=1e-3)
    classifier.close()


def test_teacher_and_student_never_saw_the_test_rows(done: Done) -> None:
    data = Dataset.open(folder_of(done.store, "dataset", "data"))
    texts = {split: {row.text for row in data.rows(split)} for split in ("train", "validation", "test")}
    assert texts["test"].isdisjoint(texts["train"] | texts["validation"])
    answers = Dataset.open(folder_of(done.store, "dataset", "answers"))
    assert {row.text for row in answers.rows("train")} == texts["train"]
    scores = Report.open(folder_of(done.store, "report", "score-student-torch")).content
    assert scores["rows"] == len(texts["test"])


def test_too_deep_a_student_is_one_sentence(done: Done, copied: Path) -> None:
    with pytest.raises(ModelError, match="hidden_size is 128"):
        run(copied, done, student={"hidden_size": 128})
