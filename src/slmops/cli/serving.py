"""From what a person wants served to an engine that answers: which forms of it there are, and which is fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.errors import MissingExtraError

if TYPE_CHECKING:
    from slmops.pipeline import BaseForm
    from slmops.serve.choose import Choice

AUTO = "auto"


def published(source: str, store: Path, *, engine: str = AUTO) -> list[Path]:
    """The folders of a published model at four bits, fetched and converted the first time: for onnxruntime, and for
    OpenVINO where its extra and ``nncf`` are installed; or the one that ``engine`` runs."""
    from slmops.cli.render import progress_bars
    from slmops.store import Store

    try:
        from slmops.pipeline import base_variant
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Serving a published model (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        return [base_variant(source, opened, form=one, progress=progress).path for one in _forms(engine)]


def choose_engine(
    paths: Sequence[Path], *, engine: str = AUTO, clients: int = 8, threads: int | None = None, again: bool = False
) -> Choice | None:
    """The model folder and engine among ``paths`` (artifacts or model folders) that serve best here; None for a
    classifier, which has one engine. Their files are compared with their digests first.

    Raises:
        UsageError: ``engine`` is none, or cannot run this model.
        SlmopsError: nothing that can be served, or bytes that have changed.
    """
    from slmops.cli.render import progress_bars
    from slmops.evaluate.machine import machine_facts
    from slmops.models.cache import cache_root
    from slmops.package import check_digests, resolve_model_folder
    from slmops.runtime.description import ModelDescription
    from slmops.runtime.engines import runs
    from slmops.serve.choose import Choice, candidates_of, choose
    from slmops.trust import digest_tree, tree_digest

    digests = [check_digests(path) for path in paths]
    folders = [resolve_model_folder(path) for path in paths]
    if any((one / "slmops.json").exists() and ModelDescription.read(one).form == "classifier" for one in folders):
        return None
    if engine != AUTO:
        folder = next((one for one in folders if runs(engine, one)), folders[0])
        return Choice(engine, str(folder), "named by --engine")
    known = [digest or tree_digest(digest_tree(folder)) for digest, folder in zip(digests, folders, strict=True)]
    with progress_bars() as progress:
        return choose(
            candidates_of(folders),
            digests=known,
            machine=machine_facts(),
            kept=cache_root() / "engines",
            clients=clients,
            threads=threads,
            again=again,
            progress=progress,
        )


def _forms(engine: str) -> list[BaseForm]:
    if engine.startswith("openvino"):
        return ["openvino"]
    if engine == "llama.cpp":
        return ["gguf"]
    installed = all(find_spec(name) is not None for name in ("openvino_genai", "openvino_tokenizers", "nncf"))
    return ["onnx", "openvino"] if engine == AUTO and installed else ["onnx"]
