"""A checkpoint in, a smaller one out: loadable, provably the same where it must be, and refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fakes.tiny_models import write_tiny_llama, write_tiny_model
from slmops.artifacts import Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.chat.files import open_tokenizer
from slmops.compress import export_classifier, export_generator
from slmops.compress.prune.checkpoint import prune_checkpoint, row_texts
from slmops.errors import DataError, ModelError, UsageError
from slmops.models.classifier import PooledClassifier, load_classifier, save_classifier
from slmops.models.vocabulary import kept_between
from slmops.recipe import PruneConfig
from slmops.runtime import GenerationRequest, open_classifier, open_generator
from slmops.train.student import StudentShape, narrow_encoder

TEXTS = [("my card is lost", "refund"), ("hello world how are you", "today"), ("where is my top up", "tell me now")]
ROWS = [Row(str(n), (Message("user", f"{text} {n}"),), target) for n, (text, target) in enumerate(TEXTS * 4)]
UNSEEN = ["the balance of 99 cards", "Größe 東京 😀", "\x00\n\t", "please tell the account"]


def shown(row: Row) -> tuple[Message, ...]:
    return row.messages


def pruned(folder: Path, to: Path, *, rows: list[Row] = ROWS, closed: bool = False, **config: Any) -> dict[str, Any]:
    """Prune ``folder`` to ``to``; the metrics."""
    draft = Draft(to, to.with_name(f"{to.name}.work"))
    to.mkdir(parents=True)
    draft.work.mkdir()
    prune_checkpoint(
        folder,
        draft,
        PruneConfig(rows=8, **config),
        rows,
        further=[Row("v", (Message("user", "what is the balance"),), "fee")],
        to_messages=None if closed else shown,
        max_tokens=64,
        seed=0,
    )
    return draft.metrics


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["added_tokens_decoder"] = {
        "0": {"content": "<|endoftext|>", "special": True},
        "1": {"content": "<|im_start|>", "special": True},
        "2": {"content": "<|im_end|>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "LICENSE").write_text("as you like", "utf-8")
    return folder


@pytest.fixture(scope="module")
def classifier(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    shutil.copy(llama / "tokenizer.json", folder)
    torch.manual_seed(0)
    encoder = narrow_encoder(llama, tuple(range(300)), StudentShape(2, 64, 96))
    save_classifier(PooledClassifier(encoder, ("a", "b", "c")), folder)
    return folder


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found


# --- tokens -----------------------------------------------------------------------------------------------------


def test_kept_tokens_read_and_answer_as_before(llama: Path, tmp_path: Path) -> None:
    metrics = pruned(llama, tmp_path / "small", vocabulary="trim")
    full, small = open_tokenizer(llama / "tokenizer.json"), open_tokenizer(tmp_path / "small" / "tokenizer.json")
    kept = kept_between(full, small)
    assert metrics["tokens"] == len(kept) < metrics["tokens_before"] == 300
    assert metrics["parameters"] == metrics["parameters_before"] - (300 - len(kept)) * 64
    assert metrics["divergence"] == 0
    for text in row_texts(llama, ROWS, shown):
        before, after = full.encode(text, add_special_tokens=False), small.encode(text, add_special_tokens=False)
        assert [kept[i] for i in after.ids] == before.ids
        assert small.decode(after.ids, skip_special_tokens=False) == full.decode(before.ids, skip_special_tokens=False)
    ids = small.encode(row_texts(llama, ROWS[:1], shown)[0]).ids
    expected = logits(llama, [kept[i] for i in ids])[:, list(kept)]
    torch.testing.assert_close(logits(tmp_path / "small", ids), expected, rtol=0, atol=1e-5)
    for text in UNSEEN:
        assert small.decode(small.encode(text).ids, skip_special_tokens=False) == text
    assert (tmp_path / "small" / "LICENSE").read_text("utf-8") == "as you like"


def test_transformers_and_ours_agree_on_the_trimmed_tokens(llama: Path, tmp_path: Path) -> None:
    pruned(llama, tmp_path / "small", vocabulary="trim")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "small"), ChatTokenizer.load(tmp_path / "small")
    talk = (Message("user", "my card is lost, Größe 東京"),)
    text = ours.render(talk, add_generation_prompt=True)
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode_prompt(talk)
    config = json.loads((tmp_path / "small" / "config.json").read_text("utf-8"))
    assert config["eos_token_id"] == theirs.eos_token_id == theirs.convert_tokens_to_ids("<|im_end|>")
    generation = json.loads((tmp_path / "small" / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == theirs.eos_token_id
    assert len(theirs) == config["vocab_size"]


def test_common_merges_stay_besides(llama: Path, tmp_path: Path) -> None:
    few = pruned(llama, tmp_path / "few", vocabulary="trim")
    more = pruned(llama, tmp_path / "more", vocabulary="trim", common_merges=40)
    assert few["tokens"] < more["tokens"] <= 300


def test_a_tokenizer_of_another_kind_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "words")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.train_from_iterator(
        ["my card"], trainers.WordLevelTrainer(special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"])
    )
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"WordLevel tokenizer cannot be trimmed.*compress\.prune\.vocabulary: keep"):
        pruned(tmp_path / "words", tmp_path / "small", vocabulary="trim")


# --- shapes -----------------------------------------------------------------------------------------------------


def test_shares_and_what_is_told_of_them(llama: Path, tmp_path: Path) -> None:
    metrics = pruned(llama, tmp_path / "small", depth=0.5, heads=0.5, channels=0.5, hidden=0.25)
    config = json.loads((tmp_path / "small" / "config.json").read_text("utf-8"))
    assert (metrics["layers"], metrics["heads"], metrics["groups"]) == (1, 2, 2)
    assert (metrics["channels"], metrics["hidden"]) == (64, 48) == (config["intermediate_size"], config["hidden_size"])
    weights = load_file(tmp_path / "small" / "model.safetensors")
    assert metrics["parameters"] == sum(weight.numel() for name, weight in weights.items() if name != "lm_head.weight")
    assert metrics["removed"] == pytest.approx(1 - metrics["parameters"] / metrics["parameters_before"])
    assert len(metrics["layers_gone"]) == 1
    assert metrics["divergence"] > 0


def test_of_several_sizes_the_nearest_is_taken(llama: Path, tmp_path: Path) -> None:
    metrics = pruned(llama, tmp_path / "small", parameters=0.3, by="both", vocabulary="trim")
    assert len(metrics["tried"]) > 1
    assert metrics["divergence"] == min(one["divergence"] for one in metrics["tried"])
    best = min(metrics["tried"], key=lambda one: one["divergence"])
    assert {name: metrics[name] for name in best if name != "divergence"} == {
        name: value for name, value in best.items() if name != "divergence"
    }


@pytest.mark.parametrize("how", ["divergence", "influence", "evenly"])
def test_layers_by_each_measure(tmp_path: Path, how: Any) -> None:
    write_tiny_model(tmp_path / "deep", "llama", layers=6)
    metrics = pruned(tmp_path / "deep", tmp_path / "small", depth=0.5, depth_by=how)
    assert metrics["layers"] == 3
    assert metrics["layers_gone"] == [1, 3, 4] if how == "evenly" else len(set(metrics["layers_gone"])) == 3
    assert load_file(tmp_path / "small" / "model.safetensors").keys() >= {"model.layers.2.mlp.up_proj.weight"}
    before = load_file(tmp_path / "deep" / "model.safetensors")
    after = load_file(tmp_path / "small" / "model.safetensors")
    kept = [number for number in range(6) if number not in metrics["layers_gone"]]
    for new, old in enumerate(kept):
        name = "self_attn.q_proj.weight"
        assert torch.equal(after[f"model.layers.{new}.{name}"], before[f"model.layers.{old}.{name}"])


def test_a_classifier_both_ways(classifier: Path, tmp_path: Path) -> None:
    """It stays bidirectional, keeps its head, and answers the same in the exported graph."""
    metrics = pruned(classifier, tmp_path / "small", closed=True, channels=0.5, hidden=0.25, vocabulary="trim")
    config = json.loads((tmp_path / "small" / "config.json").read_text("utf-8"))
    assert (config["is_causal"], config["intermediate_size"], config["hidden_size"]) == (False, 48, 48)
    assert metrics["tokens"] < 300
    model = load_classifier(tmp_path / "small")
    assert model.labels == ("a", "b", "c")
    exported = Draft(tmp_path / "onnx", tmp_path / "work")
    exported.work.mkdir()
    export_classifier(tmp_path / "small", exported, precision="fp32", task="classification", name="x", max_tokens=32)
    graph, torch_one = open_classifier(tmp_path / "onnx" / "model"), open_classifier(tmp_path / "small")
    texts = [row.text for row in ROWS] + UNSEEN
    found, expected = graph.probabilities(texts), torch_one.probabilities(texts)
    assert abs(found - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_pruned_model_is_built_and_answers_as_in_torch(family: str, tmp_path: Path) -> None:
    """Depth, grouped heads, channels, hidden size and tokens: the builder takes it, and says what torch says."""
    write_tiny_model(tmp_path / "whole", family, layers=3)
    pruned(
        tmp_path / "whole",
        tmp_path / "small",
        depth=0.34,
        heads=0.5,
        channels=0.5,
        hidden=0.25,
        vocabulary="trim",
    )
    draft = Draft(tmp_path / "built", tmp_path / "work")
    draft.work.mkdir()
    export_generator(
        tmp_path / "small", draft, precision="fp32", task="conversation", name="x", max_tokens=64, system=None
    )
    question = (Message("user", "where is my card"),)
    built, torch_one = open_generator(tmp_path / "built" / "model"), open_generator(tmp_path / "small")
    try:
        pairs = [(question, "tell me now")]
        found, expected = built.score(pairs)[0].logprob, torch_one.score(pairs)[0].logprob
        assert found == pytest.approx(expected, abs=1e-2)
        assert built.generate([GenerationRequest(question, max_tokens=4)])
    finally:
        built.close()
        torch_one.close()


# --- what cannot be pruned --------------------------------------------------------------------------------------


def changed(llama: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(llama, to)
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **config}), "utf-8")
    return to


def test_bad_models_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="type rwkv cannot be pruned"):
        pruned(changed(llama, tmp_path / "a", model_type="rwkv"), tmp_path / "x", depth=0.5)
    with pytest.raises(ModelError, match="5 heads for queries and 2 for keys"):
        pruned(changed(llama, tmp_path / "b", num_attention_heads=5), tmp_path / "y", depth=0.5)
    with pytest.raises(ModelError, match="quantized already"):
        pruned(changed(llama, tmp_path / "c", quantization_config={"bits": 4}), tmp_path / "z", depth=0.5)
    with pytest.raises(ModelError, match=r"no config\.json"):
        pruned(tmp_path / "nothing", tmp_path / "w", depth=0.5)


def test_a_weight_that_is_no_number_is_named(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5:7] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has 2 numbers that are not finite"):
        pruned(tmp_path / "bad", tmp_path / "small", channels=0.5)


def test_no_rows_and_too_much_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the train split is empty"):
        pruned(llama, tmp_path / "a", rows=[], depth=0.5)
    with pytest.raises(UsageError, match="leaves none of the 2 layers"):
        pruned(llama, tmp_path / "b", depth=0.9)
    with pytest.raises(UsageError, match="cannot be removed by depth"):
        pruned(llama, tmp_path / "c", parameters=0.9, by="depth")
