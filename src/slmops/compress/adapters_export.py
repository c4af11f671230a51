"""One base and several adapters as a model folder whose adapters are switched from answer to answer.

The base's graph is made by onnxruntime-genai's builder at any precision, its matrices in pieces; each one that an
adapter changes gets a way around it (:mod:`slmops.compress.adapter_graph`). Adapters stay in fp32 and lie beside as
``adapters/NAME.onnx_adapter``; the first of them is the one that answers where nobody names another.

Guarantees: every adapter was loaded and gave an answer whose log-probability is finite.
Not covered: what :mod:`slmops.compress.adapter_graph` does not cover, and adapters that were trained over a base in
4 bits (they are merged into that).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from slmops.artifacts import Draft, Message
from slmops.compress.folder import TRIAL_TEXT, check_answers, step
from slmops.compress.generator import TRIAL_TOKENS, export_generator
from slmops.errors import UsageError
from slmops.progress import ProgressSink, ignore
from slmops.runtime.description import ADAPTER_SUFFIX, ADAPTERS_FOLDER

AdapterPrecision = Literal["fp32", "int8", "int4"]
PRECISIONS: tuple[AdapterPrecision, ...] = get_args(AdapterPrecision)


def export_adapters(
    base_folder: Path,
    adapters: Mapping[str, Path],
    draft: Draft,
    *,
    precision: AdapterPrecision = "fp32",
    task: str,
    name: str,
    max_tokens: int,
    system: str | None,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the language model at ``base_folder`` and ``adapters``: name to a folder in peft's layout.

    Raises:
        UsageError: no adapters.
        ModelError: the base is not a language model with a chat template, or an adapter does not fit it.
        ConversionError: the builder failed, an adapter is of a kind that has to be merged, or what was made does not
            answer.
    """
    if not adapters:
        raise UsageError("No adapters were given.", remedy="Name one or more.")
    from slmops.compress.adapter_graph import fit_to, open_ways, read_adapter, write_adapter

    read = {adapter: read_adapter(folder) for adapter, folder in adapters.items()}

    def add(folder: Path) -> None:
        import onnx

        from slmops.compress.graph_files import GRAPH_NAME, save_graph

        model = onnx.load(folder / GRAPH_NAME)
        fitted = {adapter: fit_to(model, factors, adapter) for adapter, factors in read.items()}
        open_ways(model, {module for factors in fitted.values() for module in factors})
        save_graph(model, folder, external=True)
        place = folder / ADAPTERS_FOLDER
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for adapter, factors in fitted.items():
            write_adapter(factors, place / f"{adapter}{ADAPTER_SUFFIX}")

    export_generator(
        base_folder,
        draft,
        precision=precision,
        task=task,
        name=name,
        max_tokens=max_tokens,
        system=system,
        builder_options=("fuse_qkv=false",),
        change=add,
        adapters=tuple(adapters),
        progress=progress,
    )
    what, remedy = "Keeping adapters apart", "Merge them instead: slmops adapters merge."
    with step(what, remedy):
        for adapter in adapters:
            check_answers(f"The adapter {adapter}", remedy, lambda adapter=adapter: _ask(draft.path / "model", adapter))  # type: ignore[misc]
    draft.metrics |= {"adapters": list(adapters)}


def _ask(folder: Path, adapter: str) -> Any:
    from slmops.runtime.base import GenerationRequest
    from slmops.runtime.genai import GenaiGenerator

    generator = GenaiGenerator.load(folder, threads=1)
    try:
        question = (Message("user", TRIAL_TEXT),)
        generator.generate([GenerationRequest(question, max_tokens=TRIAL_TOKENS, adapter=adapter)])
        return generator.score([(question, "ok")])[0].logprob
    finally:
        generator.close()
