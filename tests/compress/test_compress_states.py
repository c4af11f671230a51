"""Graphs that give their states beside their answers: a classifier's in every precision, a generator's if asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes.children import children_here
from fakes.tiny_models import tiny_tokenizer, write_tiny_llama
from slmops.artifacts import drafting
from slmops.compress import SHOWS_STATES, export_classifier, export_generator
from slmops.compress.graph_files import run_graph
from slmops.compress.llama_graph import llama_graph
from slmops.compress.torch_graph import torch_graph
from slmops.models.classifier import PooledClassifier, load_classifier, save_classifier
from slmops.runtime import Embeds, open_classifier, open_generator

LABELS = ("a", "b", "c")
TEXTS = ["my card is lost", "x", "where is my top up and the balance of my account"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, is_causal=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(PooledClassifier(LlamaModel(config), LABELS), folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_both_graphs_give_what_torch_pools(checkpoint: Path) -> None:
    classifier = load_classifier(checkpoint)
    weights = {name: tensor.numpy() for name, tensor in classifier.state_dict().items()}
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    ids = np.random.default_rng(0).integers(0, 300, (3, 9))
    mask = (np.arange(9) < np.array([9, 4, 1])[:, None]).astype(np.int64)
    with torch.inference_mode():
        expected = classifier.pooled(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    for graph in (llama_graph(weights, config, max_tokens=48), torch_graph(classifier)):
        (states,) = run_graph(graph, {"input_ids": ids, "attention_mask": mask}, ["states"])
        assert states == pytest.approx(expected, abs=1e-4)


def test_a_classifiers_graph_gives_its_states(checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "fp16", "int8"):
        with drafting("variant", tmp_path / precision) as draft:
            export_classifier(checkpoint, draft, precision=precision, task="classification", name="x", max_tokens=48)  # type: ignore[arg-type]
        model = open_classifier(tmp_path / precision / "model")
        assert isinstance(model, Embeds)
        states, tokens = model.embed(TEXTS)
        assert states.shape == (3, 32)
        assert tokens == sum(model.count_tokens(text) for text in TEXTS)  # type: ignore[attr-defined]
        assert states[1] == pytest.approx(model.embed(TEXTS[1:2])[0][0], abs=0.05)
        found[precision] = states / np.linalg.norm(states, axis=1, keepdims=True)
        model.close()
    for precision in ("fp16", "int8"):
        assert ((found["fp32"] * found[precision]).sum(axis=1) > 0.99).all()


def test_a_generator_gives_its_states_if_asked(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "llama", context_tokens=64)
    for options, gives in ((SHOWS_STATES, True), ((), False)):
        with children_here(), drafting("variant", tmp_path / str(gives)) as draft:
            export_generator(
                tmp_path / "llama", draft, precision="int8", task="conversation", name="x", max_tokens=64, system=None,
                builder_options=options,
            )  # fmt: skip
        generator = open_generator(tmp_path / str(gives) / "model")
        assert isinstance(generator, Embeds)
        if gives:
            assert generator.embed(["hello", "x"])[0].shape == (2, 64)
        else:
            with pytest.raises(NotImplementedError):
                generator.embed(["hello"])
        generator.close()
