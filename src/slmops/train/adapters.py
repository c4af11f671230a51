"""Several adapters on one base: told apart, merged into the base, combined with one another.

An adapter is a folder in peft's layout (``adapter_config.json``, ``adapter_model.safetensors``); those trained here say
in ``slmops.json`` which base they belong to. Guarantees: an adapter is never put on a base whose digest differs from
the one it was trained on, nor, where that is not known, on one whose matrices have other shapes. Not covered:
bottlenecks, which cannot be merged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from slmops.errors import ModelError, ModelNotFoundError, UsageError

INFO_NAME = "slmops.json"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
HowCombined = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
HOW_COMBINED: tuple[HowCombined, ...] = get_args(HowCombined)
DENSITY = 0.5
"""Share of an adapter's values that ``ties``, ``dare_*`` and ``magnitude_prune`` keep."""


@dataclass(frozen=True)
class AdapterInfo:
    """``base_digest``: of the model's files, empty where nobody wrote it down."""

    name: str
    method: str
    base: str
    base_digest: str
    validation_loss: float | None = None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INFO_NAME).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> AdapterInfo:
        """What is known of the adapter at ``folder``; of one that others made, what peft wrote.

        Raises:
            ModelNotFoundError: there is no adapter.
            ModelError: its description cannot be read.
        """
        own, config = folder / INFO_NAME, folder / CONFIG_NAME
        try:
            if own.exists():
                raw = json.loads(own.read_text("utf-8"))
                return cls(raw["name"], raw["method"], raw["base"], raw["base_digest"], raw.get("validation_loss"))
            if config.exists():
                raw = json.loads(config.read_text("utf-8"))
                return cls(
                    folder.name, str(raw.get("peft_type", "")).lower(), raw.get("base_model_name_or_path") or "", ""
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"The adapter {folder} cannot be read: {type(error).__name__} {error}.") from None
        raise ModelNotFoundError(
            f"{folder} is not an adapter: it has no {CONFIG_NAME}.", remedy="Name a folder that training has written."
        )


def adapter_folder(path: Path) -> Path:
    """``path``, or the adapter inside the checkpoint at ``path``."""
    for inside in ("adapter", "bottleneck"):
        if (path / inside / INFO_NAME).exists() and not (path / CONFIG_NAME).exists():
            return path / inside
    return path


def find_adapters(folders: Iterable[Path]) -> list[tuple[Path, AdapterInfo]]:
    """The adapters in ``folders`` (checkpoints or adapters themselves), in their order."""
    found = []
    for folder in folders:
        place = adapter_folder(folder)
        if ((place / INFO_NAME).exists() and place.name != folder.name) or (place / CONFIG_NAME).exists():
            found.append((place, AdapterInfo.read(place)))
    return found


def check_base(adapter: Path, base_folder: Path, base_digest: str) -> AdapterInfo:
    """Refuse an adapter of another base.

    Raises:
        ModelError: the digests differ, or a matrix of the adapter does not fit one of the base.
    """
    info = AdapterInfo.read(adapter)
    if info.base_digest and info.base_digest != base_digest:
        raise ModelError(
            f"The adapter {adapter} was trained on {info.base} ({info.base_digest[:12]}…), not on this base "
            f"({base_digest[:12]}…).",
            remedy=f"Name that base: {info.base}." if info.base else "Name the base that it was trained on.",
        )
    if (adapter / CONFIG_NAME).exists():
        check_shapes(adapter, base_folder)
    return info


def check_shapes(adapter: Path, base_folder: Path) -> None:
    """Compare every factor pair of the adapter with the base's matrix, from the files' headers alone.

    Raises:
        ModelError: names the first matrix that is not there or has another shape.
    """
    from slmops.models.folder import read_tensors, weight_files

    shapes = {tensor.name: tensor.shape for file in weight_files(base_folder) for tensor in read_tensors(file)}
    factors = {tensor.name: tensor.shape for tensor in read_tensors(adapter / WEIGHTS_NAME)}
    for name, down in factors.items():
        if not name.endswith("lora_A.weight"):
            continue
        matrix = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        up = factors.get(name.replace("lora_A", "lora_B"))
        shape = next((shapes[known] for known in (matrix, f"model.{matrix}") if known in shapes), None)
        wanted = None if up is None else (up[0], down[1])
        if shape != wanted:
            there = "is not there" if shape is None else f"is {shape[0]} x {shape[1]}"
            raise ModelError(
                f"The adapter {adapter} does not fit {base_folder}: it changes {matrix} of {wanted}, which {there}.",
                remedy="Name the model that it was trained on.",
            )


def merge_adapter(base_folder: Path, base_digest: str, adapter: Path, out: Path) -> Path:
    """Write the base with the adapter's change added, as a model folder at ``out``.

    An adapter that was trained over 4 bits is merged into the values that it was trained over.

    Raises:
        ModelError: another base, or a bottleneck.
        UsageError: there is something at ``out`` already.
    """
    info = check_base(adapter, base_folder, base_digest)
    _refuse_bottleneck(info, adapter)
    _make_place(out)
    model = _merged(base_folder, adapter, info)
    model.save_pretrained(out)
    for path in sorted(base_folder.iterdir()):
        if (path.suffix in {".json", ".jinja"} and "tokenizer" in path.name) or path.name in _TOKENIZER_FILES:
            shutil.copyfile(path, out / path.name)
    return out


_TOKENIZER_FILES = frozenset({"chat_template.jinja", "special_tokens_map.json", "generation_config.json"})


def combine_adapters(
    base_folder: Path,
    base_digest: str,
    adapters: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    how: HowCombined = "linear",
    name: str = "combined",
) -> Path:
    """Write one adapter made of several on the same base to ``out`` (peft's ``add_weighted_adapter``).

    ``weights`` default to equal shares of 1. ``linear`` needs equal ranks; ``cat`` is exact for any ranks and grows the
    rank; ``svd`` approximates; ``ties`` (Yadav et al. 2023) and ``dare`` (Yu et al. 2024) drop what is small or random.

    Raises:
        UsageError: fewer than two adapters, another number of weights, an unknown way, or something at ``out`` already.
        ModelError: an adapter of another base, ranks that differ where they must not, or a bottleneck.
    """
    if len(adapters) < 2:
        raise UsageError(f"{len(adapters)} adapter given; combining takes two or more.")
    shares = list(weights) if weights is not None else [1 / len(adapters)] * len(adapters)
    if len(shares) != len(adapters):
        raise UsageError(f"{len(shares)} weights for {len(adapters)} adapters.", remedy="Give one weight an adapter.")
    if how not in HOW_COMBINED:
        raise UsageError(f"Adapters cannot be combined by {how!r}.", remedy=f"Choose one of {', '.join(HOW_COMBINED)}.")
    infos = [check_base(adapter, base_folder, base_digest) for adapter in adapters]
    for info, adapter in zip(infos, adapters, strict=True):
        _refuse_bottleneck(info, adapter)
    ranks = [json.loads((adapter / CONFIG_NAME).read_text("utf-8"))["r"] for adapter in adapters]
    if len(set(ranks)) > 1 and how not in {"cat", "svd"}:
        raise ModelError(
            f"The adapters have ranks {', '.join(map(str, ranks))}; {how} needs equal ones.",
            remedy="Combine them by cat (exact) or svd.",
        )
    _make_place(out)
    model = _loaded(base_folder, adapters)
    options: dict[str, Any] = {"density": DENSITY} if how not in {"linear", "cat", "svd"} else {}
    names = [f"adapter_{index}" for index in range(len(adapters))]
    model.add_weighted_adapter(names, shares, "combined", combination_type=how, **options)
    model.peft_config["combined"].base_model_name_or_path = infos[0].base
    model.save_pretrained(out, selected_adapters=["combined"], save_embedding_layers=False)
    for path in (out / "combined").iterdir():  # peft puts an adapter of its own name one folder down
        path.rename(out / path.name)
    (out / "combined").rmdir()
    (out / "README.md").unlink(missing_ok=True)
    AdapterInfo(name, infos[0].method, infos[0].base, base_digest).write(out)
    return out


def _merged(base_folder: Path, adapter: Path, info: AdapterInfo) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.models.quiet import load_bitsandbytes, quiet_transformers
    from slmops.train.quantized_base import check_bitsandbytes, round_to_nf4

    quiet_transformers()
    load_bitsandbytes()
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    if info.method == "qlora":
        check_bitsandbytes()
        round_to_nf4(model)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _loaded(base_folder: Path, adapters: Sequence[Path]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.models.quiet import load_bitsandbytes, quiet_transformers

    quiet_transformers()
    load_bitsandbytes()
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="adapter_0")
    for index, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(str(adapter), adapter_name=f"adapter_{index}")
    return model


def _refuse_bottleneck(info: AdapterInfo, adapter: Path) -> None:
    if info.method == "bottleneck":
        raise ModelError(
            f"{adapter} is a bottleneck adapter: its activation cannot be written into the weights.",
            remedy="Train with train.method: lora what is to be merged or combined.",
        )


def _make_place(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"There is something at {out} already.", remedy="Choose another --out, or delete it.")
    out.mkdir(parents=True, exist_ok=True)
