"""A model of SmolLM2-135M's configuration with random weights, for machines where the real ones cannot be had.

It takes the same time and memory as the real one; of what it learns nothing should be concluded. The tokenizer is that
of a folder, or byte pairs of the benchmark's own texts (fewer than the model's 49,152, so that rows are a little longer
or shorter in tokens).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PEAKED = 12.0
"""What the last norm is multiplied with: logits of fresh weights lie so near together that nothing is likelier than
anything else, and a teacher of that kind has nothing to tell."""


def write_model(
    folder: Path, texts: Iterable[str], tokenizer: Path | None = None, config: dict[str, Any] | None = None
) -> Path:
    """Weights and tokenizer in the layout of transformers; ``config`` instead of SmolLM2-135M's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(config or SMOLLM2_135M)))
    with torch.no_grad():
        model.model.norm.weight.mul_(PEAKED)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if tokenizer is None:
        write_tokenizer(folder, texts, model.config.vocab_size)
        return folder
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    return folder


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> None:
    """Byte pairs of ``texts``, at most ``vocabulary`` of them, with ChatML as the template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def weights_in_words(random: bool) -> str:
    """For the result, so that nobody takes one for the other."""
    return (
        "random, of SmolLM2-135M's configuration: speed and memory count, quality does not"
        if random
        else "SmolLM2-135M"
    )
