"""Open a model folder with the engines of a device: onnxruntime and onnxruntime-genai, and llama.cpp or OpenVINO where
their extras are installed; never torch."""

from __future__ import annotations

from pathlib import Path

from slmops.errors import ModelError
from slmops.runtime.base import Classifier, Generator
from slmops.runtime.description import ModelDescription


def open_device_model(folder: Path, *, threads: int | None = None) -> Classifier | Generator:
    """The model in ``folder``, loaded and ready; its description says which form it has.

    Raises:
        ModelNotFoundError: not a model folder.
        CorruptArtifactError: a file of it is missing, damaged, or does not fit the others.
        MissingExtraError: its engine is an extra that is not installed.
        ModelError: it was made for an engine that a device does not have.
    """
    description = ModelDescription.read(folder)
    match description.runtime, description.form:
        case "onnx", "classifier":
            from slmops.runtime.onnx_classifier import OnnxClassifier

            return OnnxClassifier.load(folder, threads=threads)
        case "onnx-genai", "generator":
            from slmops.runtime.genai import GenaiGenerator

            return GenaiGenerator.load(folder, threads=threads)
        case "llama.cpp", "generator":
            from slmops.runtime.gguf import GgufGenerator

            return GgufGenerator.load(folder, threads=threads)
        case "openvino", "generator":
            from slmops.runtime.openvino import OpenvinoGenerator

            return OpenvinoGenerator.load(folder, threads=threads)
        case runtime, form:
            raise ModelError(
                f"{folder} holds a {form} for {runtime}, which is not an engine of a device.",
                remedy="Compress it first: slmops compress.",
            )
