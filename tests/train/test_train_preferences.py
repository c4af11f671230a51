"""Learning from pairs: the margin of the chosen answers rises, by our templates; bad pairs are named by row."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import make_draft
from transformers import AutoModelForCausalLM

from slmops.artifacts import Message, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError, RecipeError
from slmops.progress import Progress
from slmops.recipe import PreferencesConfig, TrainConfig, load_recipe, parse_recipe, portable_recipe
from slmops.train.generator.preferences import Pair, encode_pairs, learn_preferences, mean_margin, read_pairs

QUESTIONS = ["where is my card", "what is the fee", "what is my balance", "hello", "where is my top up", "a refund"]


def to_messages(row: Row) -> tuple[Message, ...]:
    return row.messages


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def pairs(copies: int = 4) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{question} {copy}", "chosen": "please tell me", "rejected": "go away"}
        for copy in range(copies)
        for question in QUESTIONS
    ]


def test_tokens_are_those_of_the_chat_layer(llama: Path) -> None:
    tokenizer = ChatTokenizer.load(llama)
    pair = Pair((Message("system", "be kind"), Message("user", "hello")), "hello you", "no")
    (encoded,) = encode_pairs(tokenizer, [pair], to_messages, 512)
    assert encoded.prompt == tokenizer.encode_prompt(pair.messages)
    for answer, ids in (("hello you", encoded.chosen), ("no", encoded.rejected)):
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"{answer}<|im_end|>"
    assert encode_pairs(tokenizer, [pair], to_messages, len(encoded.prompt) + 2) == []


def test_margin_is_the_difference_of_log_probabilities(llama: Path) -> None:
    """Against one token at a time."""
    tokenizer = ChatTokenizer.load(llama)
    (encoded,) = encode_pairs(tokenizer, [Pair((Message("user", "hello"),), "hello you", "no")], to_messages, 512)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()

    def slow(answer: list[int]) -> float:
        total, ids = 0.0, list(encoded.prompt)
        for token in answer:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            total += float(logits[token] - math.log(float(torch.exp(logits).sum())))
            ids.append(token)
        return total

    margin = slow(encoded.chosen) - slow(encoded.rejected)
    found = mean_margin(model, [encoded])
    assert found["margin"] == pytest.approx(margin, abs=1e-3)
    assert found["accuracy"] == float(margin > 0)


@pytest.mark.slow
def test_the_margin_of_the_chosen_answers_rises(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the extra preferences is not installed")
    shutil.copytree(llama, tmp_path / "student")
    (tmp_path / "student" / "history.json").write_text("[]")
    file = write(tmp_path / "pairs.jsonl", pairs())
    config = PreferencesConfig(file=str(file), epochs=2, learning_rate=5e-4)
    train = TrainConfig(max_tokens=64, precision="fp32")
    events: list[Progress] = []
    drafts = [make_draft(tmp_path / name) for name in ("one", "two")]
    for draft in drafts:
        learn_preferences(tmp_path / "student", file, config, train, to_messages, 0, draft, progress=events.append)
    metrics = drafts[0].metrics
    assert metrics["pairs_held_out"] is True
    assert metrics["pairs"] + metrics["pairs_measured"] == 24
    assert metrics["margin_after"] > metrics["margin_before"] + 2
    assert metrics["preference_accuracy_after"] == 1.0
    assert events[-1].task == "preferences"
    assert events[-1].done == events[-1].total
    # What was written is what was measured, whole, and the same when it is done again.
    out = drafts[0].path
    assert {"config.json", "model.safetensors", "tokenizer.json", "history.json", "preferences.json"} <= {
        path.name for path in out.iterdir()
    }
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    everything = encode_pairs(ChatTokenizer.load(out), read_pairs(file), to_messages, 64)
    before = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    assert mean_margin(again, everything)["margin"] > mean_margin(before, everything)["margin"] + 2
    assert again.config.pad_token_id == before.config.pad_token_id
    first, second = (load_file(draft.path / "model.safetensors") for draft in drafts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [point["loss"] for point in json.loads((out / "preferences.json").read_text())]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)  # where both models are still the same
    assert losses[-1] < 0.5 * losses[0]


GOOD = {"prompt": "hello", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no pair"),
        ([GOOD, {**GOOD, "rejected": " yes "}], "row 2: chosen equals rejected"),
        ([GOOD, {"prompt": "hello", "chosen": "yes"}], "row 2: rejected is None"),
        ([{**GOOD, "chosen": ""}], "row 1: chosen is ''"),
        ([{"chosen": "a", "rejected": "b"}], "row 1: .* neither; its keys are chosen, rejected"),
        ([{**GOOD, "messages": []}], "both"),
        ([{"messages": [], "chosen": "a", "rejected": "b"}], "ends with the user"),
        ([{"messages": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}], "ends with the user"),
        ([{"messages": [{"role": "user"}], "chosen": "a", "rejected": "b"}], "not a conversation"),
        ([{**GOOD, "prompt": 3}], "prompt is 3"),
        ([[1]], "not a list"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path / "pairs.jsonl", rows))


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of pairs"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(DataError, match="row 1: This is not JSON"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_pairs_that_are_all_too_long(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the extra preferences is not installed")
    file = write(tmp_path / "pairs.jsonl", [GOOD])
    config, train = PreferencesConfig(file=str(file)), TrainConfig(max_tokens=3)
    with pytest.raises(DataError, match="None of 1 pairs fits into 3 tokens"):
        learn_preferences(llama, file, config, train, to_messages, 0, make_draft(tmp_path))


def test_the_recipe_takes_a_path_or_a_section(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\ntask: qa\ndata: {train: a.csv}\ntrain:\n  preferences: pairs.jsonl\n")
    loaded = load_recipe(recipe)
    assert loaded.train.preferences == PreferencesConfig(file=str(tmp_path / "pairs.jsonl"))
    recipe.write_text("name: x\ntask: qa\ndata: {train: a.csv}\ntrain:\n  preferences: {file: p.jsonl, beta: 0.3}\n")
    loaded = load_recipe(recipe)
    assert loaded.train.preferences == PreferencesConfig(file=str(tmp_path / "p.jsonl"), beta=0.3)
    assert portable_recipe(loaded)["train"]["preferences"]["file"] == "p.jsonl"
    raw = {"name": "x", "task": "classification", "data": {"train": "a.csv"}, "train": {"preferences": "p.jsonl"}}
    with pytest.raises(RecipeError, match="labels out of a fixed set"):
        parse_recipe(raw)
