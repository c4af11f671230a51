"""The engines that can serve a model folder, by name.

=================== ============ =====================================================================================
``onnx-batch``      onnx-genai   continuous batching over onnxruntime (:mod:`slmops.runtime.onnx_batch`)
``onnx-genai``      onnx-genai   onnxruntime-genai, one answer at a time; adapters, constrained answers
``openvino-batch``  openvino     OpenVINO GenAI's continuous batching, computed in fp32 with products of 8 bits
``openvino-bf16``   openvino     the same as OpenVINO does by itself: in bf16 where the processor has it
``openvino``        openvino     the graph by itself, one answer at a time
``llama.cpp-slots`` llama.cpp    llama.cpp's slots, four answers at a time
``llama.cpp``       llama.cpp    one answer at a time, whose log-probabilities are told token by token
``torch``           torch        a checkpoint, one answer at a time
``foundry``         onnx-genai   Foundry Local as a supervised child process
=================== ============ =====================================================================================

Which of them is fastest is measured (:mod:`slmops.serve.choose`); ``foundry`` is taken only where it is named.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from slmops.errors import UsageError
from slmops.runtime import open_generator
from slmops.runtime.base import Generator
from slmops.runtime.description import ModelDescription

ENGINES: dict[str, tuple[str, ...]] = {
    "onnx-genai": ("onnx-batch", "onnx-genai"),
    "openvino": ("openvino-batch", "openvino-bf16", "openvino"),
    "llama.cpp": ("llama.cpp-slots", "llama.cpp"),
    "torch": ("torch",),
}
"""By the runtime that the folder was made for: the engines that can take it, the likeliest best first."""
NAMED_ONLY = {"onnx-genai": ("foundry",)}
ALL = tuple(name for names in (*ENGINES.values(), *NAMED_ONLY.values()) for name in names)


def engines_of(folder: Path) -> tuple[str, ...]:
    """Engines that can serve the generator in ``folder`` on this installation, the likeliest best first.

    Raises:
        ModelNotFoundError: not a model folder.
    """
    description = _described(folder)
    names = ENGINES.get(description.runtime if description else "torch", ())
    if description is not None and description.adapters:
        names = tuple(name for name in names if name == "onnx-genai")
    if find_spec("openvino_genai") is None or not (folder / "openvino_tokenizer.xml").is_file():
        names = tuple(name for name in names if name not in ("openvino-batch", "openvino-bf16"))
    return names


def runs(name: str, folder: Path) -> bool:
    """Whether the engine of that name is for models as the one in ``folder``, be it installed or not."""
    description = _described(folder)
    runtime = description.runtime if description else "torch"
    return name in (*ENGINES.get(runtime, ()), *NAMED_ONLY.get(runtime, ()))


def open_engine(name: str, folder: Path, *, threads: int | None = None) -> Generator:
    """The generator in ``folder``, in the engine of that name.

    Raises:
        UsageError: there is no such engine, or it cannot serve this folder.
        SlmopsError: as the engine's ``load``.
    """
    if name not in ALL:
        raise UsageError(f"There is no engine named {name!r}.", remedy=f"Engines: {', '.join(ALL)}.")
    if not runs(name, folder):
        description = _described(folder)
        runtime = description.runtime if description else "torch"
        known = ", ".join(engines_of(folder)) or "none"
        raise UsageError(f"{folder} was made for {runtime}, which {name} does not run.", remedy=f"It can: {known}.")
    match name:
        case "onnx-batch":
            from slmops.runtime.onnx_batch import OnnxBatch

            return OnnxBatch.load(folder, threads=threads)
        case "openvino-batch" | "openvino-bf16":
            from slmops.runtime.openvino_batch import OpenvinoBatch

            return OpenvinoBatch.load(folder, threads=threads, exact=name == "openvino-batch")
        case "llama.cpp-slots":
            from slmops.runtime.gguf_slots import GgufSlots

            return GgufSlots.load(folder, threads=threads)
        case "foundry":
            from slmops.runtime.upstream import UpstreamGenerator

            return UpstreamGenerator.foundry(folder)
        case _:
            return open_generator(folder, threads=threads)


def _described(folder: Path) -> ModelDescription | None:
    """What the folder says of itself; None for a plain folder of transformers."""
    if not (folder / "slmops.json").exists() and (folder / "config.json").is_file():
        return None
    return ModelDescription.read(folder)
