"""Microsoft Olive as an engine: its LoRA and QLoRA on our tokens; no output is an error; its folders as models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from test_train_generator import answer_loss, chat_rows, chats, load, to_messages
from train_helpers import make_draft

import slmops.train.generator.olive as engine
from slmops.artifacts import Draft
from slmops.chat import ChatTokenizer
from slmops.errors import ConversionError, MissingExtraError, ModelError, RecipeError
from slmops.models import fetch_model
from slmops.models.confined import REFUSED
from slmops.recipe import LoraConfig, TrainConfig, parse_recipe
from slmops.train.generator.olive import linear_names, pass_options, train_with_olive
from slmops.train.generator.olive_child import workflow

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def config(**keys: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "engine": "olive",
        "epochs": 10,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "max_tokens": 64,
        "checkpoint_every_steps": 20,
    }
    return TrainConfig.model_validate({**base, **keys})


def train(llama: Path, folder: Path, settings: TrainConfig) -> Draft:
    draft = make_draft(folder)
    train_with_olive(chats(folder / "data"), llama, to_messages, settings, 0, draft)
    return draft


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_olive_trains_on_our_tokens(llama: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("olive", reason="the extra olive is not installed")
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="the extra olive is not installed")
    draft = train(llama, tmp_path, config(method=method))
    rows = chat_rows(1)
    before, after = answer_loss(load(llama), llama, rows), answer_loss(load(draft.path), draft.path, rows)
    assert after < 0.4 * before
    # The loss is at the answers' tokens alone: what Olive last said of the validation rows is what we find.
    history = json.loads((draft.path / "history.json").read_text())
    assert history[-1]["validation_loss"] == pytest.approx(after, rel=1e-3)
    if method == "lora":
        said = [point["validation_loss"] for point in history[:-1] if "validation_loss" in point]
        assert len(said) == 2
        assert said[-1] == pytest.approx(after, rel=1e-2)
    assert draft.metrics["engine"] == "olive"
    assert ChatTokenizer.load(draft.path).has_template
    log = (draft.work / "olive.log").read_text("utf-8", "replace")
    assert REFUSED not in log
    # The folder that Olive wrote is a model: the same one.
    if method == "lora":
        found = fetch_model(str(draft.work / "olive"), cache=tmp_path / "cache")
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (draft.path, found.path))
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
        assert answer_loss(load(found.path), found.path, rows) == pytest.approx(after, rel=1e-3)


def test_a_rank_larger_than_the_matrix_is_told_before_olive_starts(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("olive", reason="the extra olive is not installed")
    with pytest.raises(ModelError, match=r"rank is 33, but .*k_proj is 32 x 64: its rank is at most 32"):
        train(llama, tmp_path, config(lora={"rank": 33}))
    with pytest.raises(ModelError, match=r"rank is 65, but .*q_proj is 64 x 64"):
        train(llama, tmp_path / "q", config(lora={"rank": 65, "targets": ["q_proj"]}))


def test_an_olive_without_output_is_an_error(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "check_olive", lambda quantized: None)
    told = "print('no calibration data'); print('No output model produced.')"
    monkeypatch.setattr(engine, "CHILD", (sys.executable, "-c", told))
    with pytest.raises(ConversionError, match=r"ended without an adapter. It said: .*No output model produced"):
        train(llama, tmp_path, config())


def test_the_child_reaches_this_machine_only() -> None:
    code = """
import socket
import slmops.models.confined as child
child.stay_here()
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
for call in (lambda: socket.create_connection(("192.0.2.1", 80), 1), lambda: socket.getaddrinfo("example.com", 80)):
    try:
        call()
        print("open")
    except ConnectionRefusedError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines() == ["192.0.2.1 is not this machine", "example.com is not this machine"]
    assert done.stderr.count(REFUSED) == 2


def test_nothing_of_the_heartbeat_is_left() -> None:
    """Olive sends it before it reads the variable that should forbid it."""
    pytest.importorskip("olive", reason="the extra olive is not installed")
    code = (
        "import slmops.models.confined as child\n"
        "child.stay_here(); child.silence_olive()\n"
        "from olive.telemetry import Telemetry\n"
        "Telemetry()\nprint('made')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in {"CI", "OLIVE_DISABLE_TELEMETRY"}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "made"
    assert REFUSED not in done.stderr


def test_the_recipe_in_olives_words(llama: Path, tmp_path: Path) -> None:
    assert linear_names(llama) == LINEAR
    settings = config(lora=LoraConfig(rank=4, alpha=12, targets=("q_proj",)), precision="bf16")
    options = pass_options(settings, steps=80, seed=3, checkpoints=tmp_path, linear=LINEAR)
    assert (options["r"], options["alpha"], options["target_modules"], options["torch_dtype"]) == (
        *(4, 12.0, ["q_proj"], "bfloat16"),
    )
    arguments = options["training_args"]
    assert (arguments["max_steps"], arguments["seed"], arguments["report_to"]) == (80, 3, [])
    plain = pass_options(config(), steps=5, seed=0, checkpoints=tmp_path, linear=LINEAR)
    assert (plain["r"], plain["alpha"], plain["target_modules"]) == (16, 32, LINEAR)
    quantized = pass_options(config(method="qlora"), steps=5, seed=0, checkpoints=tmp_path, linear=LINEAR)
    assert quantized["save_quant_config"] is False
    asked = {"model": "m", "train_rows": "t", "validation_rows": "v", "output": "o", "pass": "LoRA", "options": plain}
    assert workflow(asked)["passes"]["finetune"]["train_data_config"] == "train_rows"


def test_a_missing_olive_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="it needs olive"):
        engine.check_olive()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": "classification"}, "open task"),
        ({"student": {}}, "student.model"),
        ({"train": {"engine": "olive", "method": "full"}}, "train.method full"),
        ({"train": {"engine": "oliv"}}, "oliv"),
    ],
)
def test_what_olive_does_not_train(sections: dict[str, Any], message: str) -> None:
    raw = {
        "name": "x",
        "task": "qa",
        "data": {"train": "a.csv"},
        "student": {"model": "m"},
        "train": {"engine": "olive"},
    }
    assert parse_recipe(raw)
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**raw, **sections})


# --- folders ----------------------------------------------------------------------------------------------------


def write_adapter(base: Path, folder: Path) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(load(base), PeftConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return model.merge_and_unload()


def same(left: Path, model: Any) -> bool:
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        return torch.allclose(load(left)(ids).logits, model.eval()(ids).logits, atol=1e-4)


def test_an_adapter_that_names_its_base_is_a_model(llama: Path, tmp_path: Path) -> None:
    merged = write_adapter(llama, tmp_path / "adapter")
    found = fetch_model(str(tmp_path / "adapter"), cache=tmp_path / "cache")
    assert same(found.path, merged)
    assert fetch_model(str(tmp_path / "adapter"), cache=tmp_path / "cache").path == found.path
    assert ChatTokenizer.load(found.path).has_template


def test_an_olive_folder_by_its_model_config(llama: Path, tmp_path: Path) -> None:
    merged = write_adapter(llama, tmp_path / "out" / "adapter")
    about = tmp_path / "out" / "adapter" / "adapter_config.json"
    raw = json.loads(about.read_text())
    about.write_text(json.dumps({**raw, "base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ModelError, match="somebody/else, which is not a folder"):
        fetch_model(str(tmp_path / "out"), cache=tmp_path / "cache")
    told = {"type": "hfmodel", "config": {"model_path": str(llama), "adapter_path": "adapter"}}
    (tmp_path / "out" / "model_config.json").write_text(json.dumps(told))
    assert same(fetch_model(str(tmp_path / "out"), cache=tmp_path / "cache").path, merged)


def test_an_olive_folder_with_a_merged_model(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "out" / "model")
    assert fetch_model(str(tmp_path / "out"), cache=tmp_path / "cache").path == tmp_path / "out" / "model"


def test_an_adapter_of_another_model_or_without_weights(llama: Path, tmp_path: Path) -> None:
    write_adapter(llama, tmp_path / "adapter")
    about = json.loads((llama / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{**about, "hidden_size": 128})).save_pretrained(other)
    named = tmp_path / "adapter" / "adapter_config.json"
    named.write_text(json.dumps({**json.loads(named.read_text()), "base_model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match="does not fit the model"):
        fetch_model(str(tmp_path / "adapter"), cache=tmp_path / "cache")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors"):
        fetch_model(str(tmp_path / "adapter"), cache=tmp_path / "cache")
