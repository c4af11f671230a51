"""A language model's checkpoint through the passes of an Olive configuration file, as a variant for onnxruntime-genai.

Olive runs in a child process that reaches this machine only, its telemetry taken out (:mod:`.olive_child`). It ends
with exit code 0 whether it made a model or not; what counts is what it wrote.

Guarantees: what is written was loaded and gave an answer whose log-probability is finite; without it there is an error
with Olive's own words. Not covered: passes that end in a checkpoint instead of a graph, or in a graph that
onnxruntime-genai cannot run by itself.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slmops.artifacts import Draft
from slmops.chat import ChatTokenizer
from slmops.compress.child import log_tail, run_child
from slmops.compress.folder import (
    check_answers,
    check_files,
    copy_tokenizer,
    count_parameters,
    model_folder,
    pad_token_id,
    step,
    write_description,
)
from slmops.compress.generator import ask_genai
from slmops.compress.olive_config import read_olive_config, stored_as, workflow
from slmops.compress.sound import check_language_model
from slmops.compress.template import check_template
from slmops.errors import ConversionError, MissingExtraError
from slmops.progress import Progress, ProgressSink, ignore

LEFT_OUT = frozenset({"model_config.json", "config.json"})
"""What Olive writes besides that no runtime reads; the first holds paths of this machine."""
LAST_PASS = 'End its passes with {"type": "ModelBuilder"}, or with a pass over what that wrote.'
STEPS = 3


def export_olive(
    checkpoint_folder: Path,
    draft: Draft,
    *,
    config: Path,
    task: str,
    name: str,
    max_tokens: int,
    system: str | None,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with what Olive makes of the language model at ``checkpoint_folder`` by the file ``config``.
    Olive's log is ``draft.work/olive.log``.

    Raises:
        RecipeError: the file cannot be used.
        MissingExtraError: olive-ai is not installed.
        ModelError: the folder is not a language model with a chat template.
        ConversionError: Olive failed, wrote nothing, or wrote what cannot be run.
    """
    settings = read_olive_config(config)
    if find_spec("olive") is None:
        raise MissingExtraError("compress.formats with olive", "olive")
    about = check_language_model(checkpoint_folder)
    check_template(ChatTokenizer.load(checkpoint_folder), checkpoint_folder)
    parameters, precision = count_parameters(checkpoint_folder), stored_as(settings)
    folder = model_folder(draft)
    task_name, what = f"compress olive {config.stem}", f"Olive, by {config.name},"
    remedy = "Run its passes one by one to see which it is, or leave the format out."
    progress(Progress(task_name, 0, STEPS, "steps", "passes"))
    built = _run(checkpoint_folder, settings, draft.work, what, remedy)
    progress(Progress(task_name, 1, STEPS, "steps", "tokenizer"))
    with step(what, remedy):
        for path in sorted(built.iterdir()):
            if path.is_file() and path.name not in LEFT_OUT:
                shutil.move(path, folder / path.name)
    copy_tokenizer(checkpoint_folder, folder)
    write_description(
        folder,
        runtime="onnx-genai",
        form="generator",
        precision=precision,
        parameters=parameters,
        labels=None,
        max_tokens=max_tokens,
        task=task,
        name=name,
        system=system,
        pad_token_id=pad_token_id(about),
    )
    for rest in ("olive-output", "olive-cache", "olive-home"):
        shutil.rmtree(draft.work / rest, ignore_errors=True)
    progress(Progress(task_name, 2, STEPS, "steps", "check"))
    check_answers(what, remedy, lambda: ask_genai(folder))
    draft.metrics |= {"precision": precision, "parameters": parameters}
    progress(Progress(task_name, STEPS, STEPS, "steps"))


def _run(checkpoint: Path, settings: dict[str, Any], work: Path, what: str, remedy: str) -> Path:
    """The folder that the last pass wrote."""
    output, cache, home = (work.resolve() / f"olive-{name}" for name in ("output", "cache", "home"))
    result, request, log = work / "olive-result.json", work / "olive-request.json", work / "olive.log"
    for path in (output, cache):
        shutil.rmtree(path, ignore_errors=True)
    result.unlink(missing_ok=True)
    content = {
        "workflow": workflow(settings, checkpoint.resolve(), output, cache),
        "result": str(result.resolve()),
    }
    request.write_text(json.dumps(content), "utf-8")
    run_child(
        ["-m", "slmops.compress.olive_child", str(request.resolve())],
        log,
        what=what,
        remedy=remedy,
        environment={"HF_HOME": str(home)},
    )
    found = json.loads(result.read_text("utf-8")) if result.is_file() else None
    if found is None:
        raise ConversionError(
            f"{what} ended with exit code 0 and without a model. {last_error(log)}",
            remedy=f"{remedy} The whole log is {log}.",
        )
    place = Path(found["path"])
    place = place if place.is_dir() else place.parent
    if found["type"].lower() != "onnxmodel" or not (place / "genai_config.json").is_file():
        raise ConversionError(
            f"{what} ended with a model of the type {found['type']} that onnxruntime-genai does not run.",
            remedy=LAST_PASS,
        )
    graph = json.loads((place / "genai_config.json").read_text("utf-8"))["model"]["decoder"]["filename"]
    check_files(place, [graph], what, remedy)
    return place


def last_error(log: Path) -> str:
    """What Olive said of a failure, in one sentence: the last line that names an exception, else its last words."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()] if log.is_file() else []
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception")) and " " in line]
    return f"It said: {named[-1]}" if named else f"It said: {log_tail(log)}"
