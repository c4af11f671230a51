"""What every variant's folder ``model/`` has: ``slmops.json``, a tokenizer, and proof that it answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slmops.artifacts import MODEL_DESCRIPTION, Draft
from slmops.artifacts.base import is_storage_trouble
from slmops.errors import ConversionError, ModelError, SlmopsError

TRIAL_TEXT = "Where is my card? 0123 – ü"
"""A fresh variant is asked this: letters, digits, punctuation, bytes beyond ASCII."""


def model_folder(draft: Draft) -> Path:
    """The draft's folder ``model/``, made."""
    folder = draft.path / "model"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path: Path) -> Any:
    """A file of a checkpoint.

    Raises:
        ModelError: it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}.", remedy="Name the folder of a trained model.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", remedy="Train or fetch the model again.") from None


def read_labels(checkpoint: Path) -> tuple[str, ...]:
    """The labels of a classifier's checkpoint.

    Raises:
        ModelError: there are none.
    """
    if not (checkpoint / "labels.json").is_file():
        raise ModelError(
            f"{checkpoint} is not a classifier: it has no labels.json.",
            remedy="Export a model of an open task as a generator.",
        )
    return tuple(read_json(checkpoint / "labels.json"))


def count_parameters(checkpoint: Path) -> int:
    """Numbers in the weight files, from their headers alone.

    Raises:
        ModelError: no weights, or weights that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{checkpoint} has no model.safetensors.", remedy="Name the folder of a trained model.")
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="numpy") as weights:
                total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{path} cannot be read: {error}.", remedy="Train or fetch the model again.") from None
    return total


def pad_token_id(config: Mapping[str, Any]) -> int:
    """What fills the shorter rows of a batch; padding is masked, so 0 will do where the model names none."""
    value = config.get("pad_token_id")
    return value if isinstance(value, int) and value >= 0 else 0


def write_description(
    folder: Path,
    *,
    runtime: str,
    form: str,
    precision: str,
    parameters: int,
    labels: Sequence[str] | None,
    max_tokens: int,
    task: str,
    name: str,
    system: str | None,
    pad_token_id: int,
    adapters: Sequence[str] = (),
) -> None:
    """Write ``slmops.json``, read by :class:`slmops.runtime.ModelDescription`."""
    description = {
        "runtime": runtime,
        "form": form,
        "precision": precision,
        "parameters": parameters,
        "labels": None if labels is None else list(labels),
        "max_tokens": max_tokens,
        "task": task,
        "name": name,
        "system": system,
        "pad_token_id": pad_token_id,
        **({"adapters": list(adapters)} if adapters else {}),
    }
    (folder / MODEL_DESCRIPTION).write_text(json.dumps(description, ensure_ascii=False) + "\n", "utf-8")


def copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    """``tokenizer.json`` without the white space that makes it a fifth larger.

    Raises:
        ModelError: there is none.
    """
    spec = read_json(checkpoint / "tokenizer.json")
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, "utf-8", errors="surrogatepass")


@contextmanager
def step(what: str, remedy: str) -> Iterator[None]:
    """Whatever a tool raises inside becomes a :class:`ConversionError` that names the step; our own errors and a full
    disk pass."""
    try:
        yield
    except (SlmopsError, MemoryError):
        raise
    except OSError as error:
        if is_storage_trouble(error):
            raise
        raise ConversionError(f"{what} failed: {_first_line(error)}.", remedy=remedy) from error
    except Exception as error:  # the tools' errors have no base of their own
        raise ConversionError(f"{what} failed: {_first_line(error)}.", remedy=remedy) from error


def check_files(folder: Path, names: Sequence[str], what: str, remedy: str) -> None:
    """Raises :class:`ConversionError` unless every file is there and has contents."""
    for name in names:
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            raise ConversionError(f"{what} ended without {name}.", remedy=remedy)


def check_answers(what: str, remedy: str, ask: Callable[[], Any]) -> None:
    """Ask a fresh variant once.

    Raises:
        ConversionError: it cannot be loaded, or its numbers are not finite.
    """
    try:
        answer = ask()
    except SlmopsError as error:
        raise ConversionError(f"{what} made a model that cannot be run: {error.message}", remedy=remedy) from error
    except Exception as error:  # the engines' errors have no base of their own
        raise ConversionError(
            f"{what} made a model that cannot be run: {_first_line(error)}.", remedy=remedy
        ) from error
    if not np.isfinite(answer).all():
        raise ConversionError(f"{what} made a model whose answers are not finite.", remedy=remedy)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
