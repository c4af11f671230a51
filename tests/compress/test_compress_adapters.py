"""One base, several adapters: the graph with an adapter is the merged model, and without one it is the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes.children import children_here
from fakes.tiny_models import write_tiny_model
from slmops.artifacts import Message, Variant, drafting
from slmops.artifacts.base import Draft
from slmops.compress.adapter_graph import read_adapter
from slmops.compress.adapters_export import export_adapters
from slmops.errors import ConversionError, CorruptArtifactError, ModelError, UsageError
from slmops.runtime import GenerationRequest, open_generator
from slmops.runtime.description import ModelDescription

ABOUT: dict[str, Any] = {"task": "conversation", "name": "tiny", "max_tokens": 256, "system": None}
QUESTION = (Message("user", "my card is lost"),)
TARGET = "how are you today?"
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def write_adapter(base: Path, folder: Path, family: str, *, rank: int, seed: int, **config: Any) -> Any:
    """A random adapter in peft's layout; the merged model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[family], **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped.merge_and_unload()


def merged_folder(base: Path, model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    return folder


def draft_in(folder: Path) -> Draft:
    for name in ("draft", "work"):
        (folder / name).mkdir()
    return Draft(folder / "draft", folder / "work")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for name, rank, more in (("polite", 4, {}), ("brief", 9, {"use_rslora": True})):
        merged_folder(
            base, write_adapter(base, root / name, "llama", rank=rank, seed=rank, **more), root / f"{name}-whole"
        )
    return {name: root / name for name in ("polite", "brief")}


@pytest.fixture(scope="module")
def variant(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    folder = tmp_path_factory.mktemp("variant") / "v"
    with children_here(), drafting("variant", folder) as draft:
        export_adapters(base, adapters, draft, **ABOUT)
    return Variant.open(folder)


def answer(model: Any, adapter: str | None = None) -> str:
    return str(model.generate([GenerationRequest(QUESTION, max_tokens=16, adapter=adapter)])[0].text)


def test_each_adapter_answers_as_its_merged_model_and_none_as_the_base(
    variant: Variant, base: Path, adapters: dict[str, Path]
) -> None:
    model = open_generator(variant.model_path, threads=1)
    wholes = {name: open_generator(path.with_name(f"{name}-whole"), threads=1) for name, path in adapters.items()}
    wholes[""] = open_generator(base, threads=1)
    expected = {name: answer(whole) for name, whole in wholes.items()}
    assert len(set(expected.values())) == 3
    requests = [GenerationRequest(QUESTION, max_tokens=16, adapter=name) for name in ("brief", "", "polite", "brief")]
    assert [one.text for one in model.generate(requests)] == [expected[r.adapter or ""] for r in requests]
    assert answer(model) == expected["polite"]  # the first one, where none is named
    pieces = model.stream(GenerationRequest(QUESTION, max_tokens=16, adapter="brief"))
    assert "".join(piece.text for piece in pieces) == expected["brief"]
    theirs, ours = (one.score([(QUESTION, TARGET)])[0].logprob for one in (wholes["polite"], model))
    assert ours == pytest.approx(theirs, abs=1e-2)


def test_what_is_written(variant: Variant) -> None:
    assert variant.description["adapters"] == ["polite", "brief"]
    assert {path.name for path in (variant.model_path / "adapters").iterdir()} == {
        "polite.onnx_adapter",
        "brief.onnx_adapter",
    }
    assert variant.manifest.metrics["adapters"] == ["polite", "brief"]


def test_an_adapter_that_is_not_there(variant: Variant, base: Path, tmp_path: Path) -> None:
    model = open_generator(variant.model_path, threads=1)
    with pytest.raises(UsageError, match=r"no adapter named 'rude'.*polite, brief"):
        answer(model, "rude")
    with pytest.raises(UsageError, match="no adapter named 'polite': this model is whole"):
        answer(open_generator(base, threads=1), "polite")
    copied = Path(shutil.copytree(variant.model_path, tmp_path / "model"))
    (copied / "adapters" / "brief.onnx_adapter").write_bytes(b"nothing")
    with pytest.raises(CorruptArtifactError, match=r"brief\.onnx_adapter cannot be loaded"):
        answer(open_generator(copied, threads=1), "brief")


@pytest.mark.parametrize(("family", "precision"), [("phi3", "fp32"), ("llama", "int4")])
def test_matrices_in_one_piece_and_bases_of_few_bits(
    base: Path, adapters: dict[str, Path], tmp_path: Path, family: str, precision: Any
) -> None:
    if family == "phi3":
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        write_tiny_model(base, "phi3", sliding_window=None, original_max_position_embeddings=512)
        whole = merged_folder(base, write_adapter(base, adapter, family, rank=3, seed=1), tmp_path / "whole")
    else:
        adapter = adapters["polite"]
        whole = adapter.with_name("polite-whole")
    draft = draft_in(tmp_path)
    with children_here():
        export_adapters(base, {"one": adapter}, draft, precision=precision, **ABOUT)
    model = open_generator(draft.path / "model", threads=1)
    with_adapter = model.score([(QUESTION, TARGET)])[0].logprob
    expected = open_generator(whole, threads=1).score([(QUESTION, TARGET)])[0].logprob
    if precision == "fp32":
        assert with_adapter == pytest.approx(expected, abs=1e-2)
        assert answer(model) == answer(open_generator(whole, threads=1))
    else:
        bare = open_generator(base, threads=1).score([(QUESTION, TARGET)])[0].logprob
        assert abs(with_adapter - expected) < abs(with_adapter - bare)


def test_adapters_that_cannot_be_kept_apart(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def changed(**changes: Any) -> Path:
        folder = Path(shutil.copytree(adapters["polite"], tmp_path / "-".join(changes)))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    for changes, match in (
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        with pytest.raises(ConversionError, match=match) as caught:
            read_adapter(changed(**changes))
        assert "adapters merge" in (caught.value.remedy or "")
    with pytest.raises(ModelError, match="is not an adapter"):
        read_adapter(base)
    with pytest.raises(UsageError, match="No adapters"):
        export_adapters(base, {}, Draft(tmp_path, tmp_path), **ABOUT)


def test_an_adapter_of_another_shape_or_without_numbers(adapters: dict[str, Path], tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file, save_file

    from slmops.compress.adapter_graph import fit_to

    weight = numpy_helper.from_array(np.zeros((64, 32), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="/model/layers.0/attn/q_proj/MatMul")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:], [weight]))
    factors = read_adapter(adapters["polite"])
    with pytest.raises(ModelError, match=r"q_proj of 64 x 64, which is 64 x 32"):
        fit_to(model, {"layers.0.self_attn.q_proj": factors["layers.0.self_attn.q_proj"]}, "polite")
    with pytest.raises(ModelError, match="which is not there"):
        fit_to(model, {"layers.7.self_attn.q_proj": factors["layers.0.self_attn.q_proj"]}, "polite")
    folder = Path(shutil.copytree(adapters["polite"], tmp_path / "nan"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("lora_B.weight"))
    tensors[name][0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is not finite"):
        read_adapter(folder)


def test_names_of_adapters_are_no_paths(tmp_path: Path) -> None:
    raw = {"runtime": "onnx-genai", "form": "generator", "adapters": ["../../etc"]}
    with pytest.raises(CorruptArtifactError, match="plain names"):
        ModelDescription.from_json(raw, tmp_path)
