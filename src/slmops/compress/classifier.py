"""A classifier's checkpoint as an ONNX graph at one precision, for :mod:`slmops.runtime.onnx_classifier`.

Guarantees: the fp32 graph gives torch's logits (compared on padded rows of several lengths before anything is made of
it); what is written was loaded and asked once. Files: ``model.onnx``, beside it ``model.onnx.data`` where the weights
are large, ``tokenizer.json``, ``slmops.json``.
Not covered: how much a lower precision costs. That is measured by the stage evaluate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.artifacts import Draft
from slmops.compress.folder import (
    TRIAL_TEXT,
    check_answers,
    check_files,
    copy_tokenizer,
    count_parameters,
    model_folder,
    pad_token_id,
    read_json,
    read_labels,
    step,
    write_description,
)
from slmops.errors import ConversionError
from slmops.models.folder import refuse_bottlenecks
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import Precision
from slmops.trust import digest_file

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

GRAPH_NAME = "model.onnx"
LOGIT_TOLERANCE = 1e-3
"""Largest difference between the graph and torch, as a share of the largest logit (1 at least)."""

STEPS = 4


def export_classifier(
    checkpoint_folder: Path,
    draft: Draft,
    *,
    precision: Precision,
    task: str,
    name: str,
    max_tokens: int,
    work_fp32: Path | None = None,
    stored_as: str | None = None,
    change: Callable[[Path], None] | None = None,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the classifier at ``checkpoint_folder``, at ``precision``.

    ``work_fp32``: a folder that keeps the fp32 graph, so that further precisions of the same checkpoint start from it.
    ``change``: called with the folder when the graph is in it; ``stored_as``: the precision that it leads to.

    Raises:
        ModelError: the folder is not a classifier.
        ConversionError: a tool failed, or what it made does not answer, or not as torch does.
    """
    stored = stored_as or precision
    task_name = f"compress {stored}"
    refuse_bottlenecks(checkpoint_folder)
    config = read_json(checkpoint_folder / "config.json")
    labels = read_labels(checkpoint_folder)
    parameters = count_parameters(checkpoint_folder)
    folder = model_folder(draft)
    progress(Progress(task_name, 0, STEPS, "steps", "graph"))
    graph = _fp32_graph(checkpoint_folder, config, max_tokens, work_fp32)
    progress(Progress(task_name, 1, STEPS, "steps", "weights"))
    what, remedy = f"Converting the classifier to {precision}", f"Leave {precision} out of compress.precisions."
    with step(what, remedy):
        from slmops.compress.graph_files import save_graph
        from slmops.compress.outliers import products_with_outliers
        from slmops.compress.precision import at_precision

        weight_only: frozenset[str] = frozenset()
        if precision == "int8":
            weight_only = products_with_outliers(graph, int(config["vocab_size"]), max_tokens)
        save_graph(at_precision(graph, precision, weight_only), folder)
        del graph
        if change is not None:
            change(folder)
    progress(Progress(task_name, 2, STEPS, "steps", "tokenizer"))
    copy_tokenizer(checkpoint_folder, folder)
    write_description(
        folder,
        runtime="onnx",
        form="classifier",
        precision=stored,
        parameters=parameters,
        labels=labels,
        max_tokens=max_tokens,
        task=task,
        name=name,
        system=None,
        pad_token_id=pad_token_id(config),
    )
    progress(Progress(task_name, 3, STEPS, "steps", "check"))
    check_files(folder, [GRAPH_NAME], what, remedy)
    check_answers(what, remedy, lambda: _ask(folder))
    draft.metrics |= {"precision": stored, "parameters": parameters, "weight_only_products": len(weight_only)}
    progress(Progress(task_name, STEPS, STEPS, "steps"))


def _fp32_graph(checkpoint: Path, config: dict[str, Any], max_tokens: int, keep: Path | None) -> onnx.ModelProto:
    """The checked fp32 graph, from ``keep`` if it is there already."""
    import onnx

    if keep is not None:
        keep = keep / f"{digest_file(checkpoint / 'model.safetensors').sha256[:16]}-{max_tokens}"
        if (keep / "done").exists():
            return onnx.load(keep / GRAPH_NAME)
    with step("Writing the classifier's graph", "Set compress.choose to fp32, or choose another student.model."):
        graph = _write_graph(checkpoint, config, max_tokens)
    if keep is not None:
        from slmops.compress.graph_files import save_graph

        keep.mkdir(parents=True, exist_ok=True)
        save_graph(graph, keep)
        (keep / "done").touch()
    return graph


def _write_graph(checkpoint: Path, config: dict[str, Any], max_tokens: int) -> onnx.ModelProto:
    from slmops.compress.llama_graph import llama_graph, why_not
    from slmops.models.classifier import load_classifier

    classifier = load_classifier(checkpoint)
    reason = why_not(config)
    if reason is None:
        weights = {name: tensor.numpy() for name, tensor in classifier.state_dict().items()}
        graph = llama_graph(weights, config, max_tokens)
    else:
        from slmops.compress.torch_graph import torch_graph

        logger.info("The graph is exported by torch: %s.", reason)
        graph = torch_graph(classifier)
    _check_same(graph, classifier, int(config["vocab_size"]), max_tokens)
    return graph


def _check_same(graph: onnx.ModelProto, classifier: Any, vocabulary: int, max_tokens: int) -> None:
    """Compare logits with torch on rows of several lengths, padded together.

    Raises:
        ConversionError: they differ.
    """
    import numpy as np
    import torch

    from slmops.compress.graph_files import run_graph, trial_rows

    ids, mask = trial_rows(vocabulary, max_tokens)
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    (logits,) = run_graph(graph, {"input_ids": ids, "attention_mask": mask}, ["logits"])
    worst = float(np.abs(logits - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not worst <= LOGIT_TOLERANCE:
        raise ConversionError(
            f"The classifier's graph does not compute what torch does: logits differ by {worst:.2g} of the largest.",
            remedy="Choose another student.model, and report this one.",
        )


def _ask(folder: Path) -> Any:
    from slmops.runtime.onnx_classifier import OnnxClassifier

    classifier = OnnxClassifier.load(folder, threads=1)
    try:
        return classifier.probabilities([TRIAL_TEXT])
    finally:
        classifier.close()
