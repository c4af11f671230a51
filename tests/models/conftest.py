"""A tiny random Llama with a byte-level tokenizer, saved as a model folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or writes a person's caches."""
    monkeypatch.delenv("SLMOPS_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def save_tiny_llama(folder: Path, *, tied: bool, shard_bytes: int | None = None) -> int:
    """Write a random Llama of two layers to ``folder``; returns its real number of parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="session")
def saved_llamas(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Path, int]]:
    made: dict[bool, tuple[Path, int]] = {}

    def get(tied: bool) -> tuple[Path, int]:
        if tied not in made:
            folder = tmp_path_factory.mktemp("llama")
            made[tied] = folder, save_tiny_llama(folder, tied=tied)
        return made[tied]

    return get


@pytest.fixture
def tiny_llama(saved_llamas: Callable[[bool], tuple[Path, int]], tmp_path: Path) -> Path:
    """A fresh copy of a model folder with tied embeddings."""
    return Path(shutil.copytree(saved_llamas(True)[0], tmp_path / "tiny"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB: enough for one tiny model."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def model_bytes(tiny_llama: Path) -> dict[str, bytes]:
    """The files of a model folder, with a model card that states a licence."""
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    files["README.md"] = b"---\nlicense: mit\ntags: [tiny]\n---\n# Tiny\n"
    return files
