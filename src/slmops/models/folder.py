"""Is this folder a model? Checked from file names and headers; no weight is read and nothing in it is run.

Only safetensors count as weights: pickled ones (``*.bin``, ``*.pt``) can run code when they are read.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.errors import ModelError, ModelNotFoundError

INDEX_NAME = "model.safetensors.index.json"
BOTTLENECK_FOLDER = "bottleneck"
"""Where adapters that cannot be merged lie beside a model (see ``models/bottleneck.py``)."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header. ``start`` and ``end`` are byte offsets into ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model folder: it has no config.json.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is damaged: {error}.", remedy="Fetch the model anew.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, not an object.", remedy="Fetch the model anew.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the index's shards, or ``model.safetensors``, or the only one there.

    Raises:
        ModelError: there are none, or the index names one that is missing.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{index} is damaged: {type(error).__name__} {error}.", remedy="Fetch the model anew."
            ) from None
        for name in names:
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing; {INDEX_NAME} names it.", remedy="Fetch the model anew.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter"))
    if len(found) == 1:
        return found
    if found:
        raise ModelError(
            f"{folder} holds {len(found)} safetensors files and no {INDEX_NAME} that says which belong together.",
            remedy="Save the model again with save_pretrained.",
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{folder} has its weights only as {pickled[0]}, a pickle, which can run code when it is read.",
            remedy="Convert it to safetensors where you trust its origin: load it with transformers and call "
            "save_pretrained.",
        )
    raise ModelError(f"{folder} has a config.json but no weights.", remedy="Put model.safetensors there.")


def read_tensors(path: Path) -> list[Tensor]:
    """The header of one safetensors file.

    Raises:
        ModelError: the file is cut short, or is not safetensors.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length > _MAX_HEADER_BYTES or length < 2:
            raise ModelError(f"{path} is not a safetensors file.", remedy="Fetch the model anew.")
        header = file.read(length)
    if len(header) < length:
        raise _cut_short(path, size_bytes, 8 + length, least=True)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        data = 8 + length
        tensors = [
            Tensor(
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                path,
                data + entry["data_offsets"][0],
                data + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        ]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"The header of {path} cannot be read: {type(error).__name__} {error}.", remedy="Fetch the model anew."
        ) from None
    end = max((tensor.end for tensor in tensors), default=data)
    if size_bytes < end:
        raise _cut_short(path, size_bytes, end)
    return tensors


def check_model_folder(folder: Path) -> None:
    """Raise unless ``folder`` holds a model that transformers can load.

    Raises:
        ModelNotFoundError: there is nothing at that path.
        ModelError: what is there is not a model, or is damaged; names the file.
    """
    if not folder.exists():
        looks_hub = len(folder.parts) == 2 and not folder.is_absolute()
        raise ModelNotFoundError(
            f"There is no model at {folder}.",
            remedy=f"If you mean a model on a hub, write hf:{folder.as_posix()}." if looks_hub else "Check the path.",
        )
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (LoRA), not a model.",
            remedy="Merge it into its base model and name the result.",
        )
    read_config(folder)
    for path in weight_files(folder):
        read_tensors(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer.", remedy="Put tokenizer.json beside config.json.")


def refuse_bottlenecks(folder: Path) -> None:
    """Raises :class:`ModelError` for a model that only the torch runtime computes rightly."""
    if (folder / BOTTLENECK_FOLDER).is_dir():
        raise ModelError(
            f"{folder} has bottleneck adapters, which no other engine runs and which cannot be merged.",
            remedy="Train with train.method: lora or full where the model is to be converted.",
        )


def _cut_short(path: Path, size_bytes: int, expected_bytes: int, *, least: bool = False) -> ModelError:
    expected = f"at least {expected_bytes:,}" if least else f"{expected_bytes:,}"
    return ModelError(
        f"{path} is cut short: {size_bytes:,} bytes where its header asks for {expected}.",
        remedy="Fetch or copy the file again.",
    )
