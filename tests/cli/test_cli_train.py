"""``slmops train`` and ``slmops adapters``: every task from a file of rows to a model that answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.tiny_models import write_tiny_llama
from slmops.cli import main

ROWS: dict[str, list[tuple[str, str]]] = {
    "classification": [("my card is lost", "lost"), ("I want a refund", "refund"), ("what is the fee", "fee")],
    "nli": [("it is lost. / where is it?", "neutral"), ("it is lost. / it is lost", "entailment")],
    "generation": [("hello", "hello world"), ("today", "how are you today")],
    "extraction": [("two people at 7", '{"people": 2, "time": "7"}'), ("three people", '{"people": 3}')],
    "summarization": [("hello world hello world how are you", "hello world"), ("my card is lost today", "lost")],
    "qa": [("where is my card", "lost"), ("what is the fee", "no fee")],
    "math": [("two and two", "2+2=4\n#### 4"), ("one and two", "1+2=3\n#### 3")],
    "conversation": [("hello", "hello how are you"), ("please", "tell me")],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_llama(folder)
    return folder


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    monkeypatch.setenv("SLMOPS_STORE", str(tmp_path / "store"))

    def called(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slmops", *map(str, arguments)])
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return called


def write_recipe(folder: Path, base: Path, task: str, **train: Any) -> Path:
    fillers = ["now", "please", "today", "you", "me", "hello", "world", "card", "fee", "lost", "where", "account"]
    rows = [
        {"text": f"{question} {filler} {number}", "answer": answer}
        for number, filler in enumerate(fillers)
        for question, answer in ROWS[task]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": f"tiny-{task}",
        "task": task,
        "data": {"train": "rows.jsonl", "target": "{answer}", "near_duplicates": None},
        "teacher": {"model": str(base)},
        "train": {"epochs": 4, "batch_size": 8, "precision": "fp32", "learning_rate": 5e-3, "max_tokens": 96, **train},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("task", sorted(ROWS))
def test_every_task_is_trained_and_answers(call: Call, base: Path, tmp_path: Path, task: str) -> None:
    recipe = write_recipe(tmp_path, base, task)
    code, out, err = call("train", recipe, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert not result["reused"]
    history = json.loads(Path(result["path"], "history.json").read_text())
    losses = [point["loss"] for point in history if "loss" in point]
    assert losses[-1] < 0.8 * losses[0]
    if task in {"classification", "nli"}:
        from slmops.runtime import open_classifier

        answer = open_classifier(Path(result["path"]))
        assert set(answer.labels) == {label for _, label in ROWS[task]}
    else:
        from slmops.artifacts import Message
        from slmops.runtime import GenerationRequest, open_generator

        generator = open_generator(Path(result["path"]))
        [given] = generator.generate([GenerationRequest((Message("user", ROWS[task][0][0]),), max_tokens=4)])
        assert given.completion_tokens > 0
        generator.close()
    code, out, _ = call("train", recipe, "--json")
    assert (code, json.loads(out)["reused"]) == (0, True)


def write_field(folder: Path) -> Path:
    """A handbook as people have it: a folder of chapters, of which some lie deeper, and a note of the editor."""
    lines = ["my card is lost and I want a refund", "what is the fee of my account", "where is my top up today"]
    chapters = folder / "handbook"
    (chapters / "annex").mkdir(parents=True)
    for number in range(24):
        place = chapters if number % 2 else chapters / "annex"
        (place / f"{number}.md").write_text(f"# {number}\n\n" + "\n".join(lines[: 1 + number % 3]) + "\n", "utf-8")
    (chapters / ".draft.md").write_text("not yet", "utf-8")
    return chapters


def field_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    recipe = {
        "name": "field",
        "task": "generation",
        "data": {"train": "handbook", "text": "{text}", "near_duplicates": None},
        "teacher": {"model": str(base)},
        "train": {"epochs": 12, "batch_size": 4, "precision": "fp32", "learning_rate": 5e-3, "max_tokens": 48},
        **sections,
    }
    path = folder / "field.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_folder_of_running_text_makes_a_model_of_its_field(call: Call, base: Path, tmp_path: Path) -> None:
    write_field(tmp_path)
    recipe = field_recipe(tmp_path, base)
    code, out, err = call("train", recipe, "--out", tmp_path / "field", "--json")
    assert code == 0, err
    found = json.loads(Path(json.loads(out)["path"], "manifest.json").read_text("utf-8"))["metrics"]
    assert 0 < found["documents_trained"] < 24, "chapters are held out, and the hidden note is none"
    assert found["tokens_judged"] > 0
    assert found["perplexity_after"] < 0.5 * found["perplexity_before"]
    assert (tmp_path / "field/model.safetensors").exists()
    code, out, err = call("train", recipe)
    assert code == 0, err
    assert "perplexity" in (out + err)
    taught = write_recipe(tmp_path, tmp_path / "field", "qa")
    assert call("train", taught)[0] == 0, "the field's model is a base like any other"


def test_running_text_is_for_training_alone(call: Call, base: Path, tmp_path: Path) -> None:
    write_field(tmp_path)
    code, _, err = call("run", field_recipe(tmp_path, base))
    assert code in (1, 2)
    assert "slmops train RECIPE --out FOLDER" in err
    code, _, err = call("train", field_recipe(tmp_path, base, task="qa"))
    assert code in (1, 2)
    assert "set task: generation" in err
    code, _, err = call("train", field_recipe(tmp_path, base, data={"train": "handbook"}))
    assert code in (1, 2)
    assert "a folder of txt and md files goes with data.text" in err
    empty = {"train": "nothing", "text": "{text}"}
    (tmp_path / "nothing").mkdir()
    code, _, err = call("train", field_recipe(tmp_path, base, data=empty))
    assert code in (1, 2)
    assert "holds no txt or md file" in err


def test_adapters_are_listed_combined_and_merged(call: Call, base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, "qa")
    for name, seed in (("first", 1), ("second", 2)):
        code, _, err = call("train", recipe, "--set", f"name={name}", "--set", f"seed={seed}", "--out", tmp_path / name)
        assert code == 0, err
    code, out, _ = call("adapters", "list", "--json")
    found = json.loads(out)["adapters"]
    assert sorted(one["name"] for one in found) == ["first", "second"]
    assert {one["method"] for one in found} == {"lora"}
    assert str(base) not in json.dumps([{**one, "path": ""} for one in found])
    assert call("adapters", "list")[1].count("lora") >= 2
    both = [tmp_path / "first", tmp_path / "second"]
    options = ["--base", base, "--out", tmp_path / "mixed", "--weight", "0.5", "--weight", "0.5", "--how", "cat"]
    code, _, err = call("adapters", "combine", *both, *options)
    assert code == 0, err
    code, _, err = call("adapters", "merge", tmp_path / "mixed", "--base", base, "--out", tmp_path / "whole")
    assert code == 0, err
    assert (tmp_path / "whole/model.safetensors").exists()
    write_tiny_llama(tmp_path / "other", context_tokens=256)
    code, _, err = call("adapters", "merge", tmp_path / "first", "--base", tmp_path / "other", "--out", tmp_path / "x")
    assert code == 1
    assert "not on this base" in err


def test_a_changed_loss_file_trains_again(call: Call, base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, "qa", loss="mine.py:loss", epochs=1)
    text = "import torch.nn.functional as F\ndef loss(logits, targets):\n    return F.cross_entropy(logits, targets)\n"
    reused = []
    for more in ("", "", "# and more\n"):
        (tmp_path / "mine.py").write_text(text + more)
        code, out, err = call("train", recipe, "--json")
        assert code == 0, err
        reused.append(json.loads(out)["reused"])
    assert reused == [False, True, False]


@pytest.mark.parametrize(
    ("train", "code", "said"),
    [
        ({"method": "lorax"}, 2, "train.method is 'lorax'"),
        ({"lora": {"ranks": 3}}, 2, "Did you mean rank?"),
        ({"lora": {"rank": 65}}, 1, "train.lora.rank is 65"),
        ({"loss": "absent.py:loss"}, 2, "is not there"),
        ({"trackers": ["wandb"]}, 2, "train.trackers.0 is 'wandb'"),
        ({"processes": 0}, 2, "train.processes is 0"),
    ],
)
def test_wrong_recipes(call: Call, base: Path, tmp_path: Path, train: dict[str, Any], code: int, said: str) -> None:
    found, _, err = call("train", write_recipe(tmp_path, base, "qa", **train))
    assert found == code
    assert said in err.replace("\n", " ")
