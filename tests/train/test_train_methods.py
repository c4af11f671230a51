"""Methods: what is trained, what is written, and that the written model is the trained one, in every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import make_dataset, make_draft
from transformers import AutoModel, AutoModelForCausalLM

from fakes.tiny_models import ARCHITECTURES, write_tiny_model
from skipping import skip_or_fail
from slmops.artifacts import Draft, Message, Row
from slmops.errors import ModelError
from slmops.models.bottleneck import BottleneckShape, attach_bottlenecks
from slmops.recipe import BottleneckConfig, LoraConfig, TrainConfig
from slmops.runtime.torch_generator import TorchGenerator
from slmops.train import FinetuneJob, finetune
from slmops.train.methods import check_rank, lora_targets, open_tuned
from slmops.train.quantized_base import load_nf4, quantize_nf4, round_to_nf4

ANSWERS = {"where is my card": "it is lost", "what is the fee": "no fee", "hello": "hello how are you"}


def to_messages(row: Row) -> tuple[Message, ...]:
    return row.messages


def rows_of(copies: int) -> list[Row]:
    return [Row(f"{c}-{q}", (Message("user", q),), a) for c in range(copies) for q, a in ANSWERS.items()]


def need_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        skip_or_fail("bitsandbytes is not installed (the extra qlora)")


def train(folder: Path, place: Path, **settings: Any) -> Draft:
    dataset_place = place / "data"
    if not dataset_place.exists():
        make_dataset(dataset_place, {"train": rows_of(4), "validation": rows_of(1)})
    from slmops.artifacts import Dataset

    draft = make_draft(place / str(settings.get("method")))
    config = TrainConfig(**{"precision": "fp32", "batch_size": 4, "epochs": 8, "learning_rate": 1e-2, **settings})
    finetune(FinetuneJob(folder, "pypi:tiny", "d" * 64, Dataset.open(dataset_place), to_messages, config, 0, draft))
    return draft


def validation_loss(folder: Path) -> float:
    generator = TorchGenerator.load(folder)
    scores = generator.score([(row.messages, row.target or "") for row in rows_of(1)])
    return -sum(score.logprob for score in scores) / sum(score.tokens for score in scores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_architecture_learns_and_is_merged(architecture: str, method: str, tmp_path: Path) -> None:
    """The merged weights, read by the runtime, have the loss that the last validation had through the adapter."""
    if method == "qlora":
        need_bitsandbytes()
    base = tmp_path / "base"
    write_tiny_model(base, architecture)
    draft = train(base, tmp_path, method=method, lora={"rank": 8})
    history = json.loads((draft.path / "history.json").read_text())
    assert history[-1]["validation_loss"] < 0.7 * validation_loss(base)
    assert validation_loss(draft.path) == pytest.approx(history[-1]["validation_loss"], rel=2e-3)
    assert draft.metrics["packed"] is True
    before, after = load_file(base / "model.safetensors"), load_file(draft.path / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "embed" in name or "norm" in name} <= same
    adapter = draft.path / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "slmops.json"} == {p.name for p in adapter.iterdir()}
    assert str(tmp_path) not in (adapter / "adapter_config.json").read_text()
    assert draft.metrics["parameters_trained"] < 0.5 * draft.metrics["parameters"]


@pytest.mark.parametrize("lora", [{"rslora": True}, {"dora": True}, {"targets": ["q_proj"]}, {"dropout": 0.1}])
def test_kinds_of_lora(llama: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    draft = train(llama, tmp_path, method="lora", lora={"rank": 4, **lora})
    config = json.loads((draft.path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["use_rslora"] == lora.get("rslora", False)
    assert config["use_dora"] == lora.get("dora", False)
    history = json.loads((draft.path / "history.json").read_text())
    assert validation_loss(draft.path) == pytest.approx(history[-1]["validation_loss"], rel=2e-3)
    before, after = load_file(llama / "model.safetensors"), load_file(draft.path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = ["q_proj"] if "targets" in lora else ["_proj"]
    assert changed == {name for name in before if any(part in name for part in wanted)}


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("after", ["both", "feed_forward"])
def test_bottlenecks_are_trained_saved_and_run(architecture: str, after: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_model(base, architecture)
    draft = train(base, tmp_path, method="bottleneck", bottleneck={"size": 16, "after": after})
    history = json.loads((draft.path / "history.json").read_text())
    assert history[-1]["validation_loss"] < 0.8 * validation_loss(base)
    assert validation_loss(draft.path) == pytest.approx(history[-1]["validation_loss"], rel=1e-3)
    before, after_weights = load_file(base / "model.safetensors"), load_file(draft.path / "model.safetensors")
    assert before.keys() == after_weights.keys()
    assert all(torch.equal(before[name], after_weights[name]) for name in before)
    own = load_file(draft.path / "bottleneck/model.safetensors")
    parts = 2 * (2 if after == "both" else 1)
    assert sum(tensor.numel() for tensor in own.values()) == parts * (64 * 16 * 2 + 16 + 64)
    assert draft.metrics["parameters_trained"] == sum(tensor.numel() for tensor in own.values())


def test_a_fresh_bottleneck_changes_nothing(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before = model(ids).logits
        attach_bottlenecks(model, BottleneckShape(8))
        assert torch.equal(model(ids).logits, before)


def test_bottlenecks_are_not_converted(llama: Path, tmp_path: Path) -> None:
    from slmops.compress import export_generator

    draft = train(llama, tmp_path, method="bottleneck", epochs=1)
    with pytest.raises(ModelError, match="bottleneck adapters, which no other engine runs"):
        export_generator(
            draft.path,
            make_draft(tmp_path / "x"),
            precision="fp32",
            task="qa",
            name="x",
            max_tokens=64,
            system=None,
        )


def test_full_changes_all(llama: Path, tmp_path: Path) -> None:
    draft = train(llama, tmp_path, method="full", learning_rate=3e-3)
    before, after = load_file(llama / "model.safetensors"), load_file(draft.path / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (draft.path / "adapter").exists()
    history = json.loads((draft.path / "history.json").read_text())
    assert validation_loss(draft.path) == pytest.approx(history[-1]["validation_loss"], rel=1e-3)


# --- 4 bits -----------------------------------------------------------------------------------------------------


def test_nf4_computes_with_the_values_that_rounding_gives(llama: Path) -> None:
    need_bitsandbytes()
    packed = load_nf4(llama, AutoModelForCausalLM).eval()
    rounded = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    round_to_nf4(rounded)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, expected, before = packed(ids).logits, rounded(ids).logits, plain(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (found - before).abs().max() > 0.1
    kept = sum(p.numel() * p.element_size() for n, p in packed.named_parameters() if "_proj" in n)
    whole = sum(p.numel() * p.element_size() for n, p in plain.named_parameters() if "_proj" in n)
    assert kept == whole / 8
    assert packed.lm_head.weight.dtype == torch.float32


def test_nf4_has_gradients_after_a_validation(llama: Path) -> None:
    """bitsandbytes 0.50 changes the layout in eval mode where the processor knows AVX512-BF16, and then has none."""
    need_bitsandbytes()
    ids, found = torch.arange(3, 40)[None], []
    for make in (quantize_nf4, round_to_nf4):
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        make(model)
        with torch.no_grad():
            model.eval()(ids)
        model.train()(ids).logits.square().mean().backward()
        found.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def test_nf4_is_a_small_error(llama: Path) -> None:
    need_bitsandbytes()
    before = AutoModel.from_pretrained(llama, dtype=torch.float32)
    after = AutoModel.from_pretrained(llama, dtype=torch.float32)
    round_to_nf4(after)
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        if "_proj" in name:
            assert 0.03 < float((a - b).detach().norm() / a.detach().norm()) < 0.15
        else:
            assert torch.equal(a, b)


def test_bitsandbytes_is_silent_and_looks_for_nothing(tmp_path: Path) -> None:
    """A package ``kernels`` on the path would be asked to fetch one from a hub."""
    need_bitsandbytes()
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k):\n    raise SystemExit('a kernel was looked for')\n")
    code = (
        "import sys, logging; logging.basicConfig()\n"
        "import slmops.train, peft, bitsandbytes, kernels\n"
        "assert kernels.__name__ == 'kernels'\n"
    )
    paths = [str(tmp_path), *(p for p in sys.path if p)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"ernel" not in done.stderr + done.stdout


# --- what does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_rank_larger_than_the_matrix(llama: Path, tmp_path: Path, method: str) -> None:
    if method == "qlora":
        need_bitsandbytes()
    with pytest.raises(ModelError, match=r"train.lora.rank is 33, but .*k_proj is 32 x 64: its rank is at most 32"):
        train(llama, tmp_path, method=method, lora={"rank": 33})


def test_a_rank_that_just_fits() -> None:
    check_rank(32, [("a", (32, 64))])


def test_targets_that_are_not_there(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"train.lora.targets names qkv_proj") as caught:
        lora_targets(model, ["q_proj", "qkv_proj"])
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in (caught.value.remedy or "")
    assert len(lora_targets(model, "all-linear")) == 14


def test_no_place_for_a_bottleneck() -> None:
    with pytest.raises(ModelError, match="No bottleneck fits into a Linear"):
        attach_bottlenecks(torch.nn.Linear(2, 2), BottleneckShape(2))


def test_qlora_without_its_library(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slmops.train.quantized_base as quantized_base
    from slmops.errors import MissingExtraError

    monkeypatch.setattr(quantized_base, "load_bitsandbytes", lambda: False)
    with pytest.raises(MissingExtraError, match=r"train.method: qlora") as caught:
        train(llama, tmp_path, method="qlora")
    assert "slmops[qlora]" in (caught.value.remedy or "")


def test_frozen_weights_are_kept_in_bf16_where_bf16_is_computed_in(llama: Path) -> None:
    """Autocast rounds them at every use: the same numbers, at half the memory."""
    from slmops.train.loop import _keep_frozen_in_bf16, autocast

    ids = torch.arange(3, 40)[None]
    tuned = open_tuned(
        llama,
        TrainConfig(lora=LoraConfig(rank=4), bottleneck=BottleneckConfig()),
        "lora",
        AutoModelForCausalLM,
        task_type="CAUSAL_LM",
    )
    with torch.no_grad(), autocast("bf16"):
        before = tuned.model(ids).logits
        _keep_frozen_in_bf16(tuned.model)
        assert torch.equal(tuned.model(ids).logits, before)
    kinds = {p.dtype for n, p in tuned.model.named_parameters() if "base_layer" in n}
    assert kinds == {torch.bfloat16}
    assert tuned.model.get_base_model().lm_head.weight.dtype == torch.float32  # it is the embedding too
    assert {p.dtype for p in tuned.trained} == {torch.float32}
