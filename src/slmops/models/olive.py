"""Folders that Olive wrote, and adapters in peft's layout, as models.

Olive's ``finetune`` writes ``adapter/``, ``model_config.json`` and, unless told otherwise, a copy of the base in
``model/``; what it merged stands in ``model/`` alone. An adapter alone is no model: it is merged into its base (the
copy beside it, or the one that it names), once, and kept in the cache under the digest of both.

Not covered: Olive's ONNX outputs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from slmops.errors import ModelError
from slmops.models.cache import cached_digests, model_files
from slmops.models.folder import check_model_folder
from slmops.trust import digest_json, digest_tree, tree_digest

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OLIVE_CONFIG = "model_config.json"


def find_olive_adapter(folder: Path) -> Path | None:
    """The adapter in a folder that Olive wrote, or the folder itself where it is one; None where there is none."""
    for place in (folder, folder / "adapter"):
        if (place / ADAPTER_CONFIG).is_file():
            return place
    return None


def whole_model(folder: Path, root: Path) -> Path:
    """The folder of a whole model that ``folder`` stands for; ``folder`` itself where it is one, or nothing of Olive.

    ``root``: the cache, for adapters that are merged.

    Raises:
        ModelError: an adapter whose base is not on this machine, or whose weights are missing or of another model.
    """
    if not folder.is_dir() or (folder / "config.json").is_file():
        return folder
    adapter = find_olive_adapter(folder)
    if adapter is not None:
        return _merged(adapter, _base_of(folder, adapter), root)
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def merge_adapter(base: Path, adapter: Path) -> Any:
    """The model at ``base`` (transformers, float32) with the adapter's weights added to its own.

    Raises:
        ModelError: the weights are missing, or do not fit this base.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{adapter} has no {ADAPTER_WEIGHTS}.", remedy="Save the adapter with save_pretrained (safetensors)."
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()
        raise ModelError(
            f"The adapter {adapter} does not fit the model {base}: {said[0] if said else type(error).__name__}",
            remedy="Name the model that it was trained on.",
        ) from None
    return merged


def _base_of(folder: Path, adapter: Path) -> Path:
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    named = _read(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    told = _read(folder / OLIVE_CONFIG) if (folder / OLIVE_CONFIG).is_file() else {}
    paths = [told.get("config", {}).get("model_path") if isinstance(told.get("config"), dict) else None, named]
    for path in paths:
        if isinstance(path, str) and path and Path(path).is_dir():
            return Path(path)
    raise ModelError(
        f"{folder} holds an adapter (LoRA) of the model {named or 'that it does not name'}, which is not a folder on "
        "this machine.",
        remedy=f"Put the base model there, or its path into base_model_name_or_path of {adapter / ADAPTER_CONFIG}.",
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is damaged: {error}.") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a {type(raw).__name__}, not an object.")
    return raw


def _merged(adapter: Path, base: Path, root: Path) -> Path:
    check_model_folder(base)
    key = digest_json(
        {"base": tree_digest(cached_digests(model_files(base), root)), "adapter": tree_digest(digest_tree(adapter))}
    )
    destination = root / "merged" / key[:16]
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(destination.with_suffix(".lock")):
        if destination.is_dir():
            return destination
        from slmops.models.quiet import quiet_transformers

        quiet_transformers()
        model = merge_adapter(base, adapter)
        temporary = Path(tempfile.mkdtemp(dir=destination.parent))
        model.save_pretrained(temporary)
        for path in sorted(base.iterdir()):
            weights = ".safetensors" in path.suffixes
            if path.is_file() and not weights and path.name not in {"manifest.json", "config.json"}:
                shutil.copyfile(path, temporary / path.name)
        temporary.rename(destination)
    return destination
