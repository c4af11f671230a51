"""Olive's configuration files: its passes run on our checkpoint, nothing is reached, and no model is an error."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Message, Variant, drafting
from slmops.artifacts.base import Draft
from slmops.compress.olive_config import read_olive_config, stored_as, workflow
from slmops.compress.olive_export import export_olive
from slmops.errors import ConversionError, RecipeError
from slmops.models.confined import REFUSED
from slmops.runtime import open_generator

ABOUT: dict[str, Any] = {"task": "conversation", "name": "tiny", "max_tokens": 256, "system": None}
CONVERSATIONS = [((Message("user", "my card is lost"),), "how are you today?"), ((Message("user", "ü€"),), "refund")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_llama(folder)
    return folder


def config(folder: Path, passes: dict[str, Any], **more: Any) -> Path:
    path = folder / "olive.json"
    path.write_text(json.dumps({"passes": passes, **more}), "utf-8")
    return path


def draft_in(folder: Path) -> Draft:
    for name in ("draft", "work"):
        (folder / name).mkdir()
    return Draft(folder / "draft", folder / "work")


@pytest.mark.slow
def test_passes_are_run_one_after_the_other(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("olive")
    passes = {"build": {"type": "ModelBuilder", "precision": "fp32"}, "narrow": {"type": "OnnxKQuantQuantization"}}
    with drafting("variant", tmp_path / "variant") as draft:
        export_olive(checkpoint, draft, config=config(tmp_path, passes), **ABOUT)
        assert REFUSED not in (draft.work / "olive.log").read_text("utf-8")
    variant = Variant.open(tmp_path / "variant")
    assert (variant.description["runtime"], variant.description["precision"]) == ("onnx-genai", "olive")
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= {p.name for p in variant.model_path.iterdir()}
    for path in variant.model_path.glob("*.json"):
        assert str(tmp_path) not in path.read_text("utf-8"), path.name
    reference, generator = open_generator(checkpoint, threads=1), open_generator(variant.model_path, threads=1)
    ours, theirs = (np.array([s.logprob for s in one.score(CONVERSATIONS)]) for one in (generator, reference))
    assert 1e-3 < np.abs(ours - theirs).max() < 15


@pytest.mark.slow
def test_a_workflow_that_fails_with_exit_code_0_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("olive")
    file = config(tmp_path, {"build": {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 16}})
    broken = tmp_path / "broken"
    write_tiny_llama(broken)
    about = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**about, "architectures": ["NobodyForCausalLM"]}))
    draft = draft_in(tmp_path)
    with pytest.raises(ConversionError, match=r"exit code 0 and without a model.*not currently supported") as caught:
        export_olive(broken, draft, config=file, **ABOUT)
    assert "olive.log" in str(caught.value)
    assert "slmops.json" not in {path.name for path in draft.path.rglob("*")}


def test_nothing_written_at_all_is_an_error(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("olive")
    file = config(tmp_path, {"build": {"type": "ModelBuilder", "precision": "int4"}})
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(ConversionError, match=r"olive\.json, ended with exit code 0 and without a model"):
        export_olive(checkpoint, draft_in(tmp_path), config=file, **ABOUT)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({"type": "hfmodel", "path": "built"}, "of the type hfmodel"),
        ({"type": "onnxmodel", "path": "built"}, "of the type onnxmodel"),
    ],
)
def test_an_output_that_no_engine_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], match: str
) -> None:
    """A child that leaves another kind of model behind, as Olive does where the last pass is no builder."""
    pytest.importorskip("olive")
    draft = draft_in(tmp_path)
    (tmp_path / "built").mkdir()
    told = json.dumps({**found, "path": str(tmp_path / found["path"])})
    script = tmp_path / "child"
    script.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\necho '{told}' > {draft.work}/olive-result.json\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    before = dict(os.environ)
    with pytest.raises(ConversionError, match=match) as caught:
        export_olive(checkpoint, draft, config=config(tmp_path, {"q": {"type": "OnnxConversion"}}), **ABOUT)
    assert "ModelBuilder" in (caught.value.remedy or "")
    seen = (tmp_path / "environment").read_text("utf-8").splitlines()
    home = f"HF_HOME={draft.work.resolve()}/olive-home"
    assert {"OLIVE_DISABLE_TELEMETRY=1", "HF_HUB_OFFLINE=1", "HF_DATASETS_OFFLINE=1", home} <= set(seen)
    assert dict(os.environ) == before


def test_what_the_file_says_reaches_olive_and_what_is_ours_does_not(tmp_path: Path) -> None:
    raw = {
        "passes": {"build": [{"type": "ModelBuilder", "precision": "int8"}]},
        "data_configs": [{"name": "rows", "type": "DataContainer"}],
        "input_model": {"type": "HfModel", "model_path": "somewhere/else"},
        "output_dir": "elsewhere",
        "log_severity_level": 1,
    }
    made = workflow(raw, tmp_path / "model", tmp_path / "out", tmp_path / "cache")
    assert made["input_model"]["model_path"] == str(tmp_path / "model")
    assert (made["output_dir"], made["cache_dir"]) == (str(tmp_path / "out"), str(tmp_path / "cache"))
    assert (made["passes"], made["data_configs"]) == (raw["passes"], raw["data_configs"])
    assert made["log_severity_level"] == 1
    assert made["host"] == made["target"] == "slmops_here"
    own = {**raw, "systems": {"mine": {"type": "LocalSystem"}}, "target": "mine"}
    assert workflow(own, tmp_path, tmp_path, tmp_path)["target"] == "mine"
    assert "slmops_here" not in workflow(own, tmp_path, tmp_path, tmp_path)["systems"]
    assert stored_as(raw) == "int8"
    assert stored_as({"passes": {"a": {"type": "Rtn"}, "b": {"type": "ModelBuilder"}}}) == "olive"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no file"),
        ("{", "cannot be read"),
        ("[]", "names no passes"),
        ('{"passes": {}}', "names no passes"),
        ('{"passes": {"a": {"precision": "int4"}}}', "the pass a .* has no type"),
        ('{"passes": {"a": {"type": "Shrink"}}}', "of the type Shrink, which Olive does not have"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str | None, match: str) -> None:
    pytest.importorskip("olive")
    if text is not None:
        (tmp_path / "olive.json").write_text(text, "utf-8")
    with pytest.raises(RecipeError, match=match):
        read_olive_config(tmp_path / "olive.json")


def test_yaml_will_do(tmp_path: Path) -> None:
    (tmp_path / "olive.yaml").write_text("passes:\n  build: {type: ModelBuilder, precision: int4}\n", "utf-8")
    assert stored_as(read_olive_config(tmp_path / "olive.yaml")) == "int4"
