"""Real model folders, small enough to be made in a test: a bag-of-tokens classifier, a two-layer Llama and its kin."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LABELS = ("card_lost", "refund", "wann kommt sie?", "top_up", "fee", "balance")
WORDS = [
    "my card is lost and I want a refund for the fee",
    "hello world how are you today where is my top up",
    "what is the balance of my account please tell me now",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


class BagOfTokens:
    """The reference in plain numpy: mean of the tokens' vectors, times a matrix."""

    def __init__(self, vocabulary: int, width: int, labels: int) -> None:
        random = np.random.default_rng(7)
        self.embeddings = random.normal(size=(vocabulary, width)).astype(np.float32)
        self.head = random.normal(size=(width, labels)).astype(np.float32)

    def probabilities(self, ids: list[int]) -> np.ndarray:
        logits = self.embeddings[ids].astype(np.float64).mean(axis=0) @ self.head.astype(np.float64)
        exact = np.exp(logits - logits.max())
        return exact / exact.sum()


def write_tiny_classifier(folder: Path, *, max_tokens: int = 32, **description: Any) -> BagOfTokens:
    """Write a model folder for ``onnx`` in the form ``classifier``; its reference."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    reference = BagOfTokens(tokenizer.get_vocab_size(), 16, len(LABELS))
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["vectors"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["vectors", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "tokens"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask3", "tokens"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bag-of-tokens",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        [
            numpy_helper.from_array(reference.embeddings, "embeddings"),
            numpy_helper.from_array(reference.head, "head"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "tokens"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    about = {
        "runtime": "onnx",
        "form": "classifier",
        "precision": "fp32",
        "parameters": int(reference.embeddings.size + reference.head.size),
        "labels": list(LABELS),
        "max_tokens": max_tokens,
        "task": "classification",
        "name": "tiny-intents",
        "system": None,
        "pad_token_id": 0,
    }
    (folder / "slmops.json").write_text(json.dumps({**about, **description}), "utf-8")
    return reference


def write_tiny_llama(folder: Path, *, context_tokens: int = 512) -> Any:
    """Write random weights and a tokenizer in the layout of transformers; the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",  # as SmolLM2 has it: padding that also stands inside every prompt
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context_tokens,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
            initializer_range=0.3,  # wide: greedy choices are far apart, so rounding cannot turn them
        )
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


ARCHITECTURES = ("llama", "smollm3", "qwen2", "qwen3", "phi3", "phi4", "gemma3")
"""Families that :func:`write_tiny_model` knows. SmolLM2 is a Llama; Phi-4 mini is a Phi-3 that turns three quarters of
each head."""
SCALING = ("gemma2", "granite", "cohere", "cohere2", "falcon_h1")
"""Further families, whose models do something to the output layer's numbers."""


def write_tiny_model(
    folder: Path, architecture: str, *, context_tokens: int = 512, layers: int = 2, **changes: Any
) -> Any:
    """Random weights of one of :data:`ARCHITECTURES` or :data:`SCALING`, with a tokenizer; the model. ``changes``: of
    the configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    own: dict[str, dict[str, Any]] = {
        "smollm3": {"no_rope_layers": [1 - number % 2 for number in range(layers)]},
        "qwen3": {"head_dim": 16},
        "phi3": {"sliding_window": 16},
        "phi4": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
        },
        "gemma3": {
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": _alternating(layers),
            "query_pre_attn_scalar": 16,
        },
        "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
        "granite": {"logits_scaling": 6.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
        "cohere": {"logit_scale": 0.25},
        "cohere2": {"logit_scale": 0.25, "sliding_window": 16, "layer_types": _alternating(layers)},
        "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    }
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context_tokens,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": architecture in {"llama", "gemma3", "qwen2", "qwen3", "smollm3"},
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(
        {"phi4": "phi3", "gemma3": "gemma3_text"}.get(architecture, architecture),
        **{**shape, **own.get(architecture, {}), **changes},
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _alternating(layers: int) -> list[str]:
    return [("sliding_attention", "full_attention")[number % 2] for number in range(layers)]


def write_tiny_generator(
    folder: Path, checkpoint: Path, *, precision: str = "fp32", options: Sequence[str] = (), **description: Any
) -> None:
    """Export a checkpoint to a model folder for ``onnx-genai``, by the engine's own builder."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with (
            tempfile.TemporaryDirectory() as cache,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            where = ("", str(checkpoint), str(folder), precision, "cpu", cache)
            create_model(*where, **parse_extra_options(*where, ["hf_token=false", *options]))
    finally:
        logging.disable(level)
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    about = {
        "runtime": "onnx-genai",
        "form": "generator",
        "precision": precision,
        "parameters": 100_000,
        "labels": None,
        "max_tokens": config["max_position_embeddings"],
        "task": "conversation",
        "name": "tiny-chat",
        "system": None,
    }
    (folder / "slmops.json").write_text(json.dumps({**about, **description}), "utf-8")
