"""What a model folder says of itself: ``slmops.json``, typed.

A model folder stands alone: weights, graph, tokenizer and this file are all that an engine reads. Unknown fields are
ignored here and stay in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.artifacts import MODEL_DESCRIPTION, Message
from slmops.errors import CorruptArtifactError, ModelNotFoundError, UsageError

ADAPTERS_FOLDER = "adapters"
ADAPTER_SUFFIX = ".onnx_adapter"
FORMS = ("classifier", "generator")


@dataclass(frozen=True)
class ModelDescription:
    """
    ``runtime``       the engine: ``onnx``, ``onnx-genai``, ``llama.cpp``, ``openvino`` or ``torch``
    ``form``          ``classifier`` (one forward pass) or ``generator`` (token by token)
    ``parameters``    how many numbers the model has learnt, 0 where that is not known
    ``labels``        the closed label set in the order of the logits, empty for a generator
    ``max_tokens``    a classifier's texts are cut to so many tokens
    ``pad_token_id``  what fills the shorter rows of a batch
    ``adapters``      names of the adapters beside the base; the first one answers where nobody names another
    ``system``        the system message that the model was trained with, put before a conversation that has none
    ``temperature``   a classifier's logits are divided by it, for a confidence that is as often right as it says
    ``threshold``     a classifier's answer below this confidence is an abstention; None where there is no limit
    """

    runtime: str
    form: str
    precision: str = ""
    parameters: int = 0
    labels: tuple[str, ...] = ()
    max_tokens: int = 512
    pad_token_id: int = 0
    task: str = ""
    name: str = ""
    system: str | None = None
    adapters: tuple[str, ...] = ()
    temperature: float = 1.0
    threshold: float | None = None

    @classmethod
    def read(cls, folder: Path) -> ModelDescription:
        """Read ``folder/slmops.json``.

        Raises:
            ModelNotFoundError: the folder or the file is not there.
            CorruptArtifactError: the file cannot be read, or contradicts itself.
        """
        path = folder / MODEL_DESCRIPTION
        try:
            raw = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFoundError(
                f"{folder} is not a model folder: it has no {MODEL_DESCRIPTION}.",
                remedy="Name a bundle, a variant, or the folder model/ inside one.",
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CorruptArtifactError(
                f"{path} is damaged: {error}.", remedy="Fetch the bundle anew, or run again."
            ) from None
        return cls.from_json(raw, path)

    @classmethod
    def from_json(cls, raw: Any, path: Path) -> ModelDescription:
        """Check the raw description; ``path`` is for the message.

        Raises:
            CorruptArtifactError: a field is missing or has a value that no engine understands.
        """
        problem = _problem(raw)
        if problem:
            raise CorruptArtifactError(f"{path}: {problem}.", remedy="Fetch the bundle anew, or run again.")
        return cls(
            runtime=str(raw["runtime"]),
            form=str(raw["form"]),
            precision=str(raw.get("precision") or ""),
            parameters=int(raw.get("parameters") or 0),
            labels=tuple(raw.get("labels") or ()),
            max_tokens=int(raw.get("max_tokens") or 512),
            pad_token_id=int(raw.get("pad_token_id") or 0),
            task=str(raw.get("task") or ""),
            name=str(raw.get("name") or ""),
            system=raw.get("system"),
            adapters=tuple(raw.get("adapters") or ()),
            temperature=float((raw.get("calibration") or {}).get("temperature") or 1.0),
            threshold=(raw.get("calibration") or {}).get("threshold"),
        )

    def adapter_of(self, request: str | None) -> str:
        """The adapter that answers a request which names this one; ``""`` is the base alone.

        Raises:
            UsageError: there is none of that name.
        """
        if request is None:
            return self.adapters[0] if self.adapters else ""
        if request and request not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UsageError(
                f"{self.name or 'This model'} has no adapter named {request!r}.",
                remedy=f"Its adapters: {known}. The base alone is ''.",
            )
        return request

    def conversation(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages as the model was trained to see them: its own system message first, unless they bring one."""
        if self.system and not any(message.role == "system" for message in messages):
            return (Message("system", self.system), *messages)
        return tuple(messages)


def _problem(raw: Any) -> str | None:
    if not isinstance(raw, Mapping):
        return f"an object was expected, not {type(raw).__name__}"
    missing = [name for name in ("runtime", "form") if name not in raw]
    if missing:
        return f"{' and '.join(missing)} missing"
    if raw["form"] not in FORMS:
        return f"form is {raw['form']!r}, not one of {', '.join(FORMS)}"
    labels = raw.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        return "labels must be a list of texts, or null"
    adapters = raw.get("adapters")
    if adapters is not None and not (
        isinstance(adapters, list) and all(isinstance(name, str) and _is_plain(name) for name in adapters)
    ):
        return "adapters must be a list of plain names"
    if raw["form"] == "classifier" and not labels:
        return "a classifier without labels"
    if (problem := _calibration_problem(raw.get("calibration"))) is not None:
        return problem
    for name in ("max_tokens", "pad_token_id", "parameters"):
        value = raw.get(name)
        if value is not None and (not isinstance(value, int) or value < 0):
            return f"{name} is {value!r}, not a whole number from 0 up"
    return None


def _calibration_problem(raw: Any) -> str | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        return f"calibration is {raw!r}, not an object"
    temperature, threshold = raw.get("temperature", 1.0), raw.get("threshold")
    if not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
        return f"calibration.temperature is {temperature!r}, not a number above 0"
    if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
        return f"calibration.threshold is {threshold!r}, not a number from 0 to 1"
    return None


def _is_plain(name: str) -> bool:
    """Whether it is a file's name and no way out of the folder."""
    return bool(name) and name == Path(name).name and name not in (".", "..") and "\\" not in name
