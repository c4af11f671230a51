"""Several adapters on one base: found, merged, combined; and those of another base refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fakes.tiny_models import write_tiny_model
from slmops.errors import ModelError, ModelNotFoundError, UsageError
from slmops.models import fetch_model
from slmops.train.adapters import (
    HOW_COMBINED,
    AdapterInfo,
    adapter_folder,
    check_base,
    combine_adapters,
    find_adapters,
    merge_adapter,
)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(base: Path, folder: Path, seed: int, *, rank: int = 4, digest: str | None = None) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(load(base), LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    if digest is not None:
        AdapterInfo(folder.name, "lora", "pypi:tiny", digest, 1.5).write(folder)
    return folder


@pytest.fixture(scope="module")
def digest(llama: Path) -> str:
    return fetch_model(str(llama)).digest


@pytest.fixture(scope="module")
def pair(llama: Path, digest: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(llama, folder / name, seed, digest=digest) for seed, name in enumerate(("first", "second"))]


def delta(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each matrix, from its files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    downs = [name for name in factors if "lora_A" in name]
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): scale
        * factors[name.replace("lora_A", "lora_B")]
        @ factors[name]
        for name in downs
    }


def test_merged_weights_are_base_plus_product(llama: Path, digest: str, pair: list[Path], tmp_path: Path) -> None:
    out = merge_adapter(llama, digest, pair[0], tmp_path / "merged")
    before, after, added = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors"), None
    added = delta(llama, pair[0])
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor + added.get(name, 0), atol=1e-5, rtol=1e-5)
    from slmops.runtime import open_generator

    open_generator(out).close()
    with pytest.raises(UsageError, match="There is something at"):
        merge_adapter(llama, digest, pair[0], out)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_combined_is_the_weighted_sum(llama: Path, digest: str, pair: list[Path], tmp_path: Path, how: Any) -> None:
    weights = [0.7, -0.2]
    out = combine_adapters(llama, digest, pair, tmp_path / how, weights=weights, how=how)
    found, parts = delta(llama, out), [delta(llama, path) for path in pair]
    for name, tensor in found.items():
        wanted = sum(weight * part[name] for weight, part in zip(weights, parts, strict=True))
        assert isinstance(wanted, torch.Tensor)
        if how == "cat":
            torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-4)
        else:  # the best of rank 4
            u, s, v = torch.linalg.svd(wanted)
            best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
            assert (tensor - wanted).norm() <= (best - wanted).norm() * 1.001
    info = AdapterInfo.read(out)
    assert (info.name, info.base, info.base_digest) == ("combined", "pypi:tiny", digest)
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "slmops.json"}


@pytest.mark.parametrize("how", HOW_COMBINED)
def test_every_way_gives_an_adapter_that_runs(
    llama: Path, digest: str, pair: list[Path], tmp_path: Path, how: Any
) -> None:
    torch.manual_seed(0)
    out = combine_adapters(llama, digest, pair, tmp_path / "out", how=how)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = load(llama)(ids).logits
        after = PeftModel.from_pretrained(load(llama), str(out))(ids).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    merge_adapter(llama, digest, out, tmp_path / "merged")


def test_found_in_checkpoints_and_alone(pair: list[Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(pair[0], checkpoint / "adapter")
    (tmp_path / "other").mkdir()
    bottleneck = tmp_path / "narrow"
    AdapterInfo("narrow", "bottleneck", "pypi:tiny", "x").write(bottleneck / "bottleneck")
    found = find_adapters([checkpoint, pair[1], tmp_path / "other", bottleneck])
    assert [(path, info.name) for path, info in found] == [
        (checkpoint / "adapter", "first"),
        (pair[1], "second"),
        (bottleneck / "bottleneck", "narrow"),
    ]
    assert found[0][1].validation_loss == 1.5
    assert adapter_folder(checkpoint) == checkpoint / "adapter"


# --- what does not belong together ------------------------------------------------------------------------------


def test_an_adapter_of_another_base_by_digest(llama: Path, pair: list[Path], tmp_path: Path) -> None:
    for work in (
        lambda: merge_adapter(llama, "e" * 64, pair[0], tmp_path / "a"),
        lambda: combine_adapters(llama, "e" * 64, pair, tmp_path / "b"),
    ):
        with pytest.raises(ModelError, match=r"was trained on pypi:tiny .* not on this base") as caught:
            work()
        assert caught.value.remedy == "Name that base: pypi:tiny."
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_another_base_by_shapes(llama: Path, digest: str, tmp_path: Path) -> None:
    """One that others made says nothing of its base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = tmp_path / "wide"
    config = LlamaConfig(**{**json.loads((llama / "config.json").read_text()), "hidden_size": 128, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(wide)
    foreign = write_adapter(wide, tmp_path / "foreign", 0)
    with pytest.raises(ModelError, match=r"changes model.layers.0.*of \(128, 128\), which is 128 x 64"):
        check_base(foreign, llama, digest)
    write_tiny_model(tmp_path / "phi", "phi3")
    own = write_adapter(llama, tmp_path / "own", 0)
    assert check_base(own, llama, digest).base_digest == ""
    with pytest.raises(ModelError, match=r"up_proj.weight of \(128, 64\), which is not there"):
        check_base(own, tmp_path / "phi", digest)


def test_unlike_ranks(llama: Path, digest: str, pair: list[Path], tmp_path: Path) -> None:
    wide = write_adapter(llama, tmp_path / "wide", 3, rank=8, digest=digest)
    with pytest.raises(ModelError, match="have ranks 4, 8; linear needs equal ones") as caught:
        combine_adapters(llama, digest, [pair[0], wide], tmp_path / "a")
    assert "cat" in (caught.value.remedy or "")
    combine_adapters(llama, digest, [pair[0], wide], tmp_path / "b", how="cat")


def test_wrong_use(llama: Path, digest: str, pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="1 adapter given"):
        combine_adapters(llama, digest, pair[:1], out)
    with pytest.raises(UsageError, match="3 weights for 2 adapters"):
        combine_adapters(llama, digest, pair, out, weights=[1, 2, 3])
    with pytest.raises(UsageError, match="cannot be combined by 'mix'"):
        combine_adapters(llama, digest, pair, out, how="mix")  # type: ignore[arg-type]
    with pytest.raises(ModelNotFoundError, match="is not an adapter"):
        AdapterInfo.read(tmp_path)
    AdapterInfo("narrow", "bottleneck", "pypi:tiny", digest).write(tmp_path / "narrow")
    with pytest.raises(ModelError, match="is a bottleneck adapter"):
        merge_adapter(llama, digest, tmp_path / "narrow", out)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/slmops.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read: JSONDecodeError"):
        AdapterInfo.read(tmp_path / "torn")
