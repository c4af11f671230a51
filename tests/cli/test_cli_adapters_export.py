"""``slmops adapters export``: two adapters beside one base, and each of them behind the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from fakes.children import children_here
from fakes.tiny_models import write_tiny_llama
from slmops.cli.app import app
from slmops.serve.app import create_app
from slmops.serve.server import background


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("place")
    write_tiny_llama(folder / "base")
    for seed, name in enumerate(("polite", "brief")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2)
        wrapped.save_pretrained(folder / name, save_embedding_layers=False)
    return folder


def export(place: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["adapters", "export", *arguments, "--base", str(place / "base"), "--offline"])


def test_two_adapters_are_exported_and_served(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "assistant"
    with children_here():
        paths = [f"kind={place / 'polite'}", str(place / "brief")]
        done = export(place, *paths, "--out", str(out), "--max-tokens", "256")
    assert done.exit_code == 0, done.output
    assert "with kind, brief" in done.output
    with background(create_app(out / "model", name="assistant")) as url, httpx.Client(base_url=url) as client:
        listed = [one["id"] for one in client.get("/v1/models").json()["data"]]
        assert listed == ["assistant", "assistant:kind", "assistant:brief"]
        assert client.get("/v1/models/assistant:brief").json()["id"] == "assistant:brief"

        def answer(model: str) -> str:
            body = {"model": model, "messages": [{"role": "user", "content": "my card"}], "max_tokens": 12}
            return str(client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])

        said = {name: answer(name) for name in listed}
        assert said["assistant"] == said["assistant:kind"] != said["assistant:brief"]
        gone = client.post(
            "/v1/chat/completions", json={"model": "assistant:rude", "messages": [{"role": "user", "content": "a"}]}
        )
        assert gone.status_code == 404
        assert "'assistant:brief'" in gone.json()["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["polite", "--precision", "int3"], "int3 is no precision of a base"),
        (["one=polite", "one=brief"], "Two adapters are named one"),
        (["base"], "is not an adapter"),
    ],
)
def test_wrong_use(place: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    paths = [
        "=".join([*text.split("=")[:-1], str(place / text.split("=")[-1])])
        if (place / text.split("=")[-1]).exists()
        else text
        for text in arguments
    ]
    done = export(place, *paths, "--out", str(tmp_path / "out"))
    assert done.exit_code != 0
    assert said in str(done.exception)
    assert not (tmp_path / "out").exists()
