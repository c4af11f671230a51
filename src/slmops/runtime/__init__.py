"""One way to run a model: classify, generate, score. Engines are imported only when one is opened."""

from __future__ import annotations

from pathlib import Path

from slmops.artifacts.kinds import MODEL_DESCRIPTION
from slmops.errors import ModelError
from slmops.runtime.base import (
    Ability,
    Classifier,
    Constraint,
    Delta,
    Embeds,
    FinishReason,
    Generation,
    GenerationRequest,
    Generator,
    LogitGenerator,
    OwnTokenizer,
    Probabilities,
    StatefulClassifier,
    States,
    TextScore,
    TokenLogprob,
    abilities_of,
)
from slmops.runtime.description import ModelDescription

LINEAR_MODEL = "linear.json"

__all__ = [
    "Ability",
    "Classifier",
    "Constraint",
    "Delta",
    "Embeds",
    "FinishReason",
    "Generation",
    "GenerationRequest",
    "Generator",
    "LogitGenerator",
    "ModelDescription",
    "OwnTokenizer",
    "Probabilities",
    "StatefulClassifier",
    "States",
    "TextScore",
    "TokenLogprob",
    "abilities_of",
    "open_classifier",
    "open_generator",
]


def open_generator(model_path: Path | str, *, threads: int | None = None) -> Generator:
    """Open the model folder with the engine that its ``slmops.json`` names; with torch where a plain folder of
    transformers (``config.json`` and weights) has no such file.

    Raises:
        ModelNotFoundError: neither.
        ModelError: another kind of model, or an engine that this version does not have.
        MissingExtraError: the engine is not installed.
    """
    folder = Path(model_path)
    match _engine(folder, "generator"):
        case "torch":
            from slmops.runtime.torch_generator import TorchGenerator

            return TorchGenerator.load(folder, threads=threads)
        case "onnx-genai":
            from slmops.runtime.genai import GenaiGenerator

            return GenaiGenerator.load(folder, threads=threads)
        case "llama.cpp":
            from slmops.runtime.gguf import GgufGenerator

            return GgufGenerator.load(folder, threads=threads)
        case "openvino":
            from slmops.runtime.openvino import OpenvinoGenerator

            return OpenvinoGenerator.load(folder, threads=threads)
        case engine:
            raise _unknown_engine(folder, engine, "torch, onnx-genai, llama.cpp, openvino")


def open_classifier(model_path: Path | str, *, threads: int | None = None) -> Classifier:
    """Open the model folder with the engine that its ``slmops.json`` names; with torch where a plain folder of
    transformers has no such file. Raises as :func:`open_generator`."""
    folder = Path(model_path)
    match _engine(folder, "classifier"):
        case "onnx":
            from slmops.runtime.onnx_classifier import OnnxClassifier

            return OnnxClassifier.load(folder, threads=threads)
        case "torch":
            from slmops.runtime.torch_classifier import TorchClassifier

            return TorchClassifier.load(folder, threads=threads)
        case "linear":
            from slmops.models.linear import LinearClassifier

            return LinearClassifier.load(folder)
        case engine:
            raise _unknown_engine(folder, engine, "onnx, torch, linear")


def _engine(folder: Path, form: str) -> str:
    weights = ("model.safetensors", "model.safetensors.index.json")
    if form == "classifier" and (folder / LINEAR_MODEL).is_file():
        return "linear"
    described = (folder / MODEL_DESCRIPTION).exists()
    if not described and (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights):
        return "torch"
    description = ModelDescription.read(folder)
    if description.form != form:
        raise ModelError(
            f"{folder} holds a {description.form}, not a {form}.", remedy=f"Open it as a {description.form}."
        )
    return description.runtime


def _unknown_engine(folder: Path, engine: str, known: str) -> ModelError:
    return ModelError(
        f"{folder} is made for the engine {engine!r}, which this version cannot open (it knows {known}).",
        remedy="Update slmops, or convert the model again.",
    )
