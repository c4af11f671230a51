"""What a model needs, known before it is loaded: held against what loading really gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slmops.errors import MemoryBudgetError, ModelError
from slmops.models import (
    ModelFacts,
    available_memory_bytes,
    check_memory,
    estimate_memory,
    fetch_model,
    model_facts,
)
from slmops.models.facts import bytes_by_precision
from slmops.models.memory import format_bytes, lora_parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMOL = ModelFacts(
    architecture="LlamaForCausalLM",
    parameters=134_515_008,
    bytes_by_precision={"fp32": 538_060_032, "fp16": 269_030_016, "int8": 135_439_104, "int4": 75_785_472},
    kv_cache_bytes_per_token=46_080,
    vocab_size=49_152,
    layers=30,
    hidden_size=576,
    intermediate_size=1536,
    attention_size=576,
    key_value_size=192,
    context_tokens=8192,
    tied_embeddings=True,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_what_loading_gives(
    tied: bool, saved_llamas: Callable[[bool], tuple[Path, int]], tmp_path: Path
) -> None:
    folder, real = saved_llamas(tied)
    facts = model_facts(folder)
    assert facts.parameters == real
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert facts.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert facts.tied_embeddings is tied
    assert facts.bytes_by_precision["fp32"] == 4 * real
    assert facts.bytes_by_precision["fp16"] == 2 * real
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.vocab_size, facts.layers, facts.hidden_size, facts.context_tokens) == (260, 2, 32, 128)
    assert (facts.intermediate_size, facts.attention_size, facts.key_value_size) == (80, 32, 16)


def test_a_copy_of_tied_embeddings_is_not_counted(tiny_llama: Path) -> None:
    """Some tools save the output layer although it is the input embedding."""
    from safetensors.torch import load_file, save_file

    before = model_facts(tiny_llama)
    weights = load_file(tiny_llama / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    assert model_facts(tiny_llama).parameters == before.parameters
    config = json.loads((tiny_llama / "config.json").read_text())
    del config["tie_word_embeddings"]  # now only the bytes tell
    (tiny_llama / "config.json").write_text(json.dumps(config))
    assert model_facts(tiny_llama).parameters == before.parameters
    weights["lm_head.weight"] += 1
    save_file(weights, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    assert model_facts(tiny_llama).parameters == before.parameters + 260 * 32


def test_shards_are_counted_together(saved_llamas: Callable[[bool], tuple[Path, int]], tmp_path: Path) -> None:
    folder, real = saved_llamas(True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size=50_000)
    (tmp_path / "shards" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert model_facts(tmp_path / "shards").parameters == real
    assert fetch_model(str(tmp_path / "shards"), cache=tmp_path / "cache").path == tmp_path / "shards"


def test_cache_per_token_is_what_generation_keeps(tiny_llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert model_facts(tiny_llama).kv_cache_bytes_per_token * 10 == kept


def test_models_of_other_families(tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=100, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    )
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
    )
    for name, model in (("gpt2", gpt2), ("bert", bert)):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{}")
    facts = model_facts(tmp_path / "gpt2")
    assert facts.parameters == sum(parameter.numel() for parameter in gpt2.parameters())
    assert (facts.layers, facts.hidden_size, facts.intermediate_size, facts.context_tokens) == (3, 16, 64, 32)
    assert facts.kv_cache_bytes_per_token == 3 * 2 * 16 * 4
    facts = model_facts(tmp_path / "bert")
    assert facts.parameters == sum(parameter.numel() for parameter in bert.parameters())
    assert facts.kv_cache_bytes_per_token == 0, "it does not generate"


def test_bytes_by_precision_by_hand() -> None:
    # one 10 x 64 matrix (20 blocks of 32) and one vector of 7
    assert bytes_by_precision([(10, 64), (7,)]) == {
        "fp32": 4 * 647,
        "fp16": 2 * 647,
        "int8": 640 + 4 * 10 + 4 * 7,
        "int4": 320 + 2 * 20 + 4 * 7,
    }


def test_a_quantized_model_is_refused(tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tiny_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantized already \(method: gptq\)"):
        model_facts(tiny_llama)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_config_that_lacks_a_size_is_named(key: str, tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    del config[key]
    (tiny_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"config\.json says no {key}"):
        model_facts(tiny_llama)


# --- memory -----------------------------------------------------------------------------------------------------


def test_training_arithmetic_by_hand() -> None:
    estimate = estimate_memory(SMOL, work="full", precision="fp32", batch_tokens=1024, logit_tokens=16)
    assert estimate.weights_bytes == 4 * SMOL.parameters
    assert estimate.gradients_bytes == 4 * SMOL.parameters
    assert estimate.optimizer_bytes == 8 * SMOL.parameters
    per_layer = 6 * 576 + 2 * 576 + 2 * 192 + 4 * 1536
    once = 2 * 576 + (2 * 576 + 3 * 1536)
    assert estimate.activations_bytes == 4 * (1024 * (30 * per_layer + once) + 16 * 49_152 * 3)
    assert estimate.cache_bytes == 0
    assert estimate.total_bytes == 16 * SMOL.parameters + estimate.activations_bytes


def test_inference_counts_weights_in_their_precision_and_the_cache() -> None:
    estimate = estimate_memory(SMOL, work="infer", precision="int4", batch_tokens=100)
    assert estimate.weights_bytes == SMOL.bytes_by_precision["int4"]
    assert estimate.cache_bytes == 100 * SMOL.kv_cache_bytes_per_token
    assert estimate.gradients_bytes == estimate.optimizer_bytes == 0


def test_adapters_are_counted_as_peft_counts_them(tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert lora_parameters(model_facts(tiny_llama)) == trained


def test_activations_are_near_what_torch_keeps(tiny_llama: Path) -> None:
    """Bytes that autograd saves for the backward pass, weights left out, against the estimate."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 260, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimated = estimate_memory(
        model_facts(tiny_llama), work="full", precision="fp32", batch_tokens=ids.numel()
    ).activations_bytes
    assert measured <= estimated <= 1.6 * measured


def test_work_that_fits_is_let_through() -> None:
    estimate = check_memory(SMOL, work="infer", precision="fp32", batch_tokens=64, available_bytes=10**9)
    assert estimate.fits
    assert estimate.available_bytes == 10**9


def test_a_refusal_shows_the_sum_and_what_would_fit() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        check_memory(SMOL, work="full", precision="fp32", batch_tokens=4096, available_bytes=4 * 10**9)
    message = caught.value.message
    assert "134.5 M parameters in fp32 with 4,096 tokens" in message
    assert "weights 538 MB + gradients 538 MB + optimizer 1.08 GB + activations 8 GB = 10.2 GB" in message
    assert "4 GB are free" in message
    fitting = int(str(caught.value.remedy).split()[2].replace(",", ""))
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("At most")

    def fits(tokens: int) -> bool:
        return estimate_memory(SMOL, work="full", precision="fp32", batch_tokens=tokens, available_bytes=4 * 10**9).fits

    assert fits(fitting)
    assert not fits(fitting + 1)


def test_a_refusal_where_nothing_fits_names_other_ways() -> None:
    with pytest.raises(MemoryBudgetError, match=r"Not even one token fits: train LoRA adapters"):
        check_memory(SMOL, work="full", precision="fp32", batch_tokens=1, available_bytes=10**9)
    with pytest.raises(MemoryBudgetError, match=r"run it in fp16"):
        check_memory(SMOL, work="infer", precision="fp32", batch_tokens=1, available_bytes=300 * 10**6)


def test_a_machine_that_does_not_tell_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.models.memory.available_memory_bytes", lambda: None)
    huge = replace(SMOL, layers=10**6)
    assert check_memory(huge, work="full", precision="fp32", batch_tokens=10**6).fits


def test_this_machine_tells_its_free_memory() -> None:
    free = available_memory_bytes()
    assert free is not None
    assert 10**7 < free < 10**14


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_000_000 * 1024),
        ({"fs/memory.max": "max", "fs/memory.current": "5"}, 8_000_000 * 1024),
        (
            {
                "fs/a/b/memory.max": "2000000000",
                "fs/a/b/memory.current": "1500000000",
                "fs/a/b/memory.stat": "anon 1\ninactive_file 200000000\n",
            },
            700_000_000,
        ),
        (
            {
                "fs/a/b/memory.max": "max",
                "fs/a/b/memory.current": "1",
                "fs/a/memory.max": "3000",
                "fs/a/memory.current": "1000",
            },
            2000,
        ),
        ({"fs/a/b/memory.max": "100", "fs/a/b/memory.current": "300"}, 0),
    ],
    ids=["no limit", "max", "own group, file pages count as free", "a group above", "over the limit"],
)
def test_limits_of_control_groups_hold(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory_bytes(tmp_path / "proc", tmp_path / "fs") == expected


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu,cpuacct:/x\n4:memory:/job\n")
    for folder, limit in (("job", 9223372036854771712), ("", 5000)):
        group = tmp_path / "fs/memory" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.usage_in_bytes").write_text("1000\n")
    assert available_memory_bytes(tmp_path / "proc", tmp_path / "fs") == 4000


def test_bytes_are_written_with_three_digits() -> None:
    sizes = [0, 999, 1000, 47_185_920, 538_060_032, 1_076_120_064, 2 * 10**12]
    assert [format_bytes(size) for size in sizes] == ["0 B", "999 B", "1 kB", "47.2 MB", "538 MB", "1.08 GB", "2 TB"]
