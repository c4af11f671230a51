"""A language model's checkpoint as OpenVINO's intermediate representation, at one precision.

The graph is made in a child process (:mod:`slmops.compress.openvino_child`), without a network and with its prints in a
log file. Precisions: fp32; fp16 (stored, computed as the processor likes); int8 and int4 (weights, embeddings too, by
nncf without calibration). The folder also runs in OpenVINO GenAI where openvino-tokenizers was installed when it was
made.

Guarantees: what is written was loaded and gave an answer whose log-probability is finite.
Not covered: mixtures of experts, states that are no keys and values.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
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
from slmops.errors import ConversionError, MissingExtraError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import Precision
from slmops.runtime.openvino import GRAPH_NAME, WEIGHTS_NAME

TOKENIZER_FILES = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "config.json")
"""What OpenVINO GenAI reads besides the graphs."""
ARCHITECTURES = frozenset({"llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3", "gemma3_text"})
TRIAL_TOKENS = 4
STEPS = 3


def export_openvino(
    checkpoint_folder: Path,
    draft: Draft,
    *,
    precision: Precision,
    task: str,
    name: str,
    max_tokens: int | None,
    system: str | None,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the language model at ``checkpoint_folder``, at ``precision``. The child's log is
    ``draft.work/openvino-<precision>.log``. ``max_tokens``: of prompt and answer; None: the model's context.

    Raises:
        ModelError: the folder is not a language model with a chat template.
        MissingExtraError: openvino or nncf is not installed.
        ConversionError: a type of model that is not known, the child failed (its last lines are in the message), or
            what it made does not answer.
    """
    config = check_language_model(checkpoint_folder)
    if config.get("model_type") not in ARCHITECTURES:
        raise ConversionError(
            f"{checkpoint_folder} is a model of the type {config.get('model_type')!r}, which cannot be written for "
            f"OpenVINO here (known: {', '.join(sorted(ARCHITECTURES))}).",
            remedy="Use compress.precisions or the format gguf for this model.",
        )
    check_template(ChatTokenizer.load(checkpoint_folder), checkpoint_folder)
    for module in ("openvino", *(("nncf",) if precision in ("int8", "int4") else ())):
        if find_spec(module) is None:
            raise MissingExtraError(f"Writing an OpenVINO model (it needs {module})", module)
    parameters = count_parameters(checkpoint_folder)
    folder = model_folder(draft)
    task_name = f"compress openvino {precision}"
    what, remedy = f"Writing the {precision} model for OpenVINO", "Use another precision, or the format gguf."
    progress(Progress(task_name, 0, STEPS, "steps", "trace"))
    built = _build(checkpoint_folder, draft.work, precision, what, remedy)
    progress(Progress(task_name, 1, STEPS, "steps", "tokenizer"))
    with step(what, remedy):
        for path in sorted(built.iterdir()):
            shutil.move(path, folder / path.name)
        for file in TOKENIZER_FILES:
            if (checkpoint_folder / file).is_file():
                shutil.copyfile(checkpoint_folder / file, folder / file)
    shutil.rmtree(built, ignore_errors=True)
    copy_tokenizer(checkpoint_folder, folder)
    write_description(
        folder,
        runtime="openvino",
        form="generator",
        precision=precision,
        parameters=parameters,
        labels=None,
        max_tokens=min(max_tokens or context_tokens(config), context_tokens(config)),
        task=task,
        name=name,
        system=system,
        pad_token_id=pad_token_id(config),
    )
    progress(Progress(task_name, 2, STEPS, "steps", "check"))
    check_answers(what, remedy, lambda: _ask(folder))
    draft.metrics |= {"precision": precision, "parameters": parameters}
    progress(Progress(task_name, STEPS, STEPS, "steps"))


def context_tokens(config: dict[str, Any]) -> int:
    """How many tokens the graph computes as transformers does: rotary factors for longer texts are not in it."""
    tokens = int(config["max_position_embeddings"])
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su"):
        tokens = min(tokens, int(config.get("original_max_position_embeddings") or tokens))
    return tokens


def _build(checkpoint: Path, work: Path, precision: Precision, what: str, remedy: str) -> Path:
    built = work / f"openvino-{precision}"
    shutil.rmtree(built, ignore_errors=True)
    request = work / f"openvino-{precision}.json"
    content = {
        "checkpoint": str(checkpoint.resolve()),
        "output": str(built.resolve()),
        "precision": precision,
        "tokenizer": find_spec("openvino_tokenizers") is not None,
    }
    request.write_text(json.dumps(content), "utf-8")
    log = work / f"openvino-{precision}.log"
    run_child(["-m", "slmops.compress.openvino_child", str(request.resolve())], log, what=what, remedy=remedy)
    check_files(built, [GRAPH_NAME, WEIGHTS_NAME], what, remedy)
    return built


def _ask(folder: Path) -> float:
    from slmops.runtime.base import GenerationRequest
    from slmops.runtime.openvino import OpenvinoGenerator

    generator = OpenvinoGenerator.load(folder, threads=1)
    try:
        question = (Message("user", TRIAL_TEXT),)
        generator.generate([GenerationRequest(question, max_tokens=TRIAL_TOKENS)])
        return generator.score([(question, "ok")])[0].logprob
    finally:
        generator.close()
