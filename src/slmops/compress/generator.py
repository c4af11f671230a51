"""A language model's checkpoint as a folder for onnxruntime-genai, at one precision.

The graph is made by onnxruntime-genai's own builder in a child process, without a network and with its prints in a log
file. Precisions: fp32; fp16 (weights stored in half precision, sums and cache in fp32: the builder's own fp16 graphs do
not run on a CPU); int8 and int4 (weights in blocks of 32 with a scale each, activations in 8 bits inside the kernels,
the rest fp32). int4 is made of the builder's fp32 graph, with the same codes and scales in half precision
(:mod:`slmops.compress.quantize`). The builder leaves the embeddings of an int8 model in fp32, for a model of 135 M
parameters almost half of the file; here they become 8 bits too, and one matrix with the output layer where the model
ties the two.

Guarantees: what is written was loaded, and gave an answer whose log-probability is finite.
Not covered: how much a lower precision costs. That is measured by the stage evaluate.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slmops.artifacts import Draft, Message
from slmops.chat import ChatTokenizer
from slmops.compress.child import run_child
from slmops.compress.folder import (
    TRIAL_TEXT,
    check_answers,
    check_files,
    copy_tokenizer,
    count_parameters,
    model_folder,
    pad_token_id,
    step,
    write_description,
)
from slmops.compress.sound import check_language_model
from slmops.compress.template import check_template
from slmops.errors import ConversionError
from slmops.models.folder import read_config
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import Precision

GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
BUILDER_FILES = (GRAPH_NAME, DATA_NAME, "genai_config.json", "tokenizer_config.json", "chat_template.jinja")
"""What is kept of the builder's output; ``tokenizer.json`` is written anew, without white space."""

BLOCK = 32
QUANTIZED_OPTIONS = ("accuracy_level=4", f"block_size={BLOCK}")
BUILT_AS: dict[Precision, str] = {"fp32": "fp32", "fp16": "fp32", "int8": "int8", "int4": "fp32"}
"""What the builder is asked for; the rest is done here."""
OPTIONS: dict[Precision, tuple[str, ...]] = {
    "fp32": (),
    "fp16": (),
    "int8": QUANTIZED_OPTIONS,
    "int4": (),
}
TRIAL_TOKENS = 4
UNKNOWN_MODEL = "model is not currently supported"
"""What the builder says of an architecture that it does not have."""
STEPS = 3


SHOWS_STATES = ("include_hidden_states=true",)
"""Of the builder: the graph gives its last hidden states as well."""


def export_generator(
    checkpoint_folder: Path,
    draft: Draft,
    *,
    precision: Precision,
    task: str,
    name: str,
    max_tokens: int,
    system: str | None,
    builder_options: Sequence[str] = (),
    change: Callable[[Path], None] | None = None,
    stored_as: str | None = None,
    adapters: Sequence[str] = (),
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the language model at ``checkpoint_folder``, at ``precision``. The builder's log is
    ``draft.work/builder-<precision>.log``.

    ``builder_options``: more of the builder's own, ``key=value``. ``change``: called with the folder when graph and
    weights are in it. ``stored_as``: the precision that ``change`` leads to. ``adapters``: names of those that
    ``change`` puts beside.

    Raises:
        ModelError: the folder is not a language model with a chat template.
        ConversionError: the builder failed (its last lines are in the message), or what it made does not answer.
    """
    config = check_language_model(checkpoint_folder)
    check_template(ChatTokenizer.load(checkpoint_folder), checkpoint_folder)
    parameters = count_parameters(checkpoint_folder)
    folder = model_folder(draft)
    stored = stored_as or precision
    task_name = f"compress {stored}"
    what, remedy = f"Building the {precision} model", f"Leave {precision} out of compress.precisions."
    progress(Progress(task_name, 0, STEPS, "steps", "build"))
    built = _build(checkpoint_folder, draft.work, precision, what, remedy, builder_options)
    with step(what, remedy):
        for file in BUILDER_FILES:
            if (built / file).exists():
                shutil.move(built / file, folder / file)
        if precision != "fp32":
            _rewrite(folder, precision)
        if change is not None:
            change(folder)
    shutil.rmtree(built, ignore_errors=True)
    progress(Progress(task_name, 1, STEPS, "steps", "tokenizer"))
    copy_tokenizer(checkpoint_folder, folder)
    write_description(
        folder,
        runtime="onnx-genai",
        form="generator",
        precision=stored,
        parameters=parameters,
        labels=None,
        max_tokens=max_tokens,
        task=task,
        name=name,
        system=system,
        pad_token_id=pad_token_id(config),
        adapters=adapters,
    )
    progress(Progress(task_name, 2, STEPS, "steps", "check"))
    check_answers(what, remedy, lambda: ask_genai(folder))
    draft.metrics |= {"precision": stored, "parameters": parameters}
    progress(Progress(task_name, STEPS, STEPS, "steps"))


def _build(
    checkpoint: Path, work: Path, precision: Precision, what: str, remedy: str, options: Sequence[str] = ()
) -> Path:
    """Run the builder; the folder that it wrote.

    Raises:
        ConversionError: it failed, or left a file out.
    """
    built = work / f"built-{precision}"
    shutil.rmtree(built, ignore_errors=True)
    request, log = work / f"builder-{precision}.json", work / f"builder-{precision}.log"
    content = {
        "checkpoint": str(checkpoint.resolve()),
        "output": str(built.resolve()),
        "precision": BUILT_AS[precision],
        "cache": str((work / "builder-cache").resolve()),
        "options": ["hf_token=false", *OPTIONS[precision], *options],
    }
    request.write_text(json.dumps(content), "utf-8")
    try:
        run_child(["-m", "slmops.compress.builder_child", str(request.resolve())], log, what=what, remedy=remedy)
    except ConversionError as error:
        if UNKNOWN_MODEL not in error.message:
            raise
        kind = (read_config(checkpoint).get("architectures") or ["?"])[0]
        raise ConversionError(
            f"onnxruntime-genai's builder does not know models of the type {kind!r}.",
            remedy="Choose another student, or a format that knows it (compress.formats).",
        ) from error
    check_files(built, [GRAPH_NAME, "genai_config.json"], what, remedy)
    return built


def _rewrite(folder: Path, precision: Precision) -> None:
    """What the builder does not do for a CPU, or not as well."""
    import onnx

    from slmops.compress.graph_files import save_graph
    from slmops.compress.precision import shrink_embeddings, to_fp16
    from slmops.compress.quantize.folder import in_four_bits

    rewrite = {"fp16": to_fp16, "int8": shrink_embeddings, "int4": in_four_bits}[precision]
    save_graph(rewrite(onnx.load(folder / GRAPH_NAME)), folder, external=True)


def ask_genai(folder: Path) -> Any:
    """Generate a little and score a little; the log-probability."""
    from slmops.runtime.base import GenerationRequest
    from slmops.runtime.genai import GenaiGenerator

    generator = GenaiGenerator.load(folder, threads=1)
    try:
        question = (Message("user", TRIAL_TEXT),)
        generator.generate([GenerationRequest(question, max_tokens=TRIAL_TOKENS)])
        return generator.score([(question, "ok")])[0].logprob
    finally:
        generator.close()
