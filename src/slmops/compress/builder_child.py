"""The child process that runs onnxruntime-genai's builder: ``python -m slmops.compress.builder_child REQUEST.json``.

The builder prints, sets loggers up and keeps memory; none of it reaches the process that asked. The request:
``{"checkpoint", "output", "precision", "cache", "options": ["key=value"]}``. Exit code 0 says only that the builder
came to its end: the caller looks at what was written.

The builder reads configurations as they were before version 5 of transformers moved the rotary parameters; what it
would not find or would misread is put where it looks (:func:`as_the_builder_reads`). Some rotary parameters it leaves
out in silence, and one it applies to layers that it does not belong to (:func:`mend`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LONG = ("longrope", "su")


def main(arguments: list[str]) -> None:
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    from onnxruntime_genai.models import builder

    place = ("", request["checkpoint"], request["output"], request["precision"], "cpu", request["cache"])
    options = builder.parse_extra_options(*place, request["options"])
    as_the_builder_reads(options["hf_details"]["hf_config"])
    mend(builder)
    builder.create_model(*place, **options)


def as_the_builder_reads(config: Any) -> None:
    """Change ``config`` (transformers') in place; the model itself is read from the checkpoint again."""
    match config.model_type:
        case "gemma3_text":
            kinds = config.rope_parameters
            if "full_attention" in kinds:
                config.rope_local_base_freq = kinds["sliding_attention"]["rope_theta"]
                config.rope_theta = kinds["full_attention"]["rope_theta"]
                config.rope_parameters = dict(kinds["full_attention"])
        case "phi3":
            if config.sliding_window:
                config.layer_types = ["sliding_attention"] * config.num_hidden_layers
            rope = config.rope_parameters
            if rope["rope_type"] not in LONG:
                # Two lengths that differ mean two sets of rotary factors to the builder, and there is one.
                config.original_max_position_embeddings = config.max_position_embeddings
            else:
                config.rope_parameters = {**rope, "type": rope["rope_type"]}


def mend(builder: Any) -> None:
    """Correct the classes of the builder's module in place."""
    _leave_rotary_out(builder.SmolLM3Model)
    _stretch_llama(builder.LlamaModel)
    _stretch_global_layers(builder.Gemma3Model)


def _stretch_llama(llama: Any) -> None:
    """A Llama's class knows the scaling of Llama 3 and takes every other one for none; the common class knows them."""
    own, common = llama.make_rope_init, llama.__mro__[1].make_rope_init

    def make_rope_init(self: Any, config: Any) -> None:
        scaling = config.rope_parameters["rope_type"]
        (own if scaling == "llama3" else common)(self, config)

    llama.make_rope_init = make_rope_init


def _stretch_global_layers(gemma3: Any) -> None:
    """Positions of a Gemma 3 are stretched in the layers that see all tokens, and in those alone."""
    place = next(kind for kind in gemma3.__mro__[1:] if "make_rotary_embedding_caches" in vars(kind))
    original = place.make_rotary_embedding_caches

    def make_rotary_embedding_caches(self: Any, **kwargs: Any) -> Any:
        if kwargs.get("cos_cache_name") != "cos_cache_local":
            return original(self, **kwargs)
        factors, self.rope_attrs["rescale_factors"] = self.rope_attrs["rescale_factors"], 1
        try:
            return original(self, **kwargs)
        finally:
            self.rope_attrs["rescale_factors"] = factors

    place.make_rotary_embedding_caches = make_rotary_embedding_caches


def _leave_rotary_out(smollm3: Any) -> None:
    """Layers of a SmolLM3 without positions: the builder means to leave them out and asks for their ids instead."""
    original = smollm3.make_attention

    def make_attention(self: Any, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        attributes = self.attention_attrs
        before = attributes["rope"]
        attributes["rope"] = bool(self.no_rope_layers[layer_id])
        try:
            original(self, layer_id, attention, root_input, **kwargs)
        finally:
            attributes["rope"] = before

    smollm3.make_attention = make_attention


if __name__ == "__main__":
    main(sys.argv[1:])
