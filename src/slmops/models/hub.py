"""Models and data sets from a hub that speaks the Hugging Face protocol.

Guarantees: what is used is one commit, and the commit is told; only configuration, safetensors, tokenizer, template and
licence are fetched, never code or pickles; a cut connection is resumed; telemetry is off; with ``offline`` (or
``HF_HUB_OFFLINE``) no request is made.
Kept in the hub library's own cache (``HF_HOME``), shared with other tools, unless a cache is named. ``HF_ENDPOINT`` and
``HF_TOKEN`` are read at each call.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slmops.errors import DataError, GatedModelError, MissingExtraError, ModelError, ModelNotFoundError, SlmopsError
from slmops.models.cache import CACHE_VARIABLE, cache_root, storage_errors
from slmops.progress import Progress, ProgressSink, ignore

_MODEL_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "*.md",
)
# Other layouts of the same weights, and everything in folders (examples, exports to other engines).
_MODEL_EXCEPT = ("*/*", "consolidated*", "*.fp16.safetensors", "*.bf16.safetensors")
_DATA_PATTERNS = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "LICENSE*", "README.md")
DATA_SUFFIXES = frozenset({".parquet", ".jsonl", ".json", ".csv", ".tsv"})
_COMMIT = re.compile(r"[0-9a-f]{40}")

logger = logging.getLogger(__name__)


def fetch_hub_model(
    name: str,
    revision: str | None,
    *,
    cache: Path | None = None,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> tuple[Path, str]:
    """Folder of the model ``name`` and the commit it is at.

    Raises:
        ModelNotFoundError: no such repository or revision, or ``offline`` and it is not in the cache.
        GatedModelError: a licence must be accepted first.
        ModelError: the hub cannot be reached or does not answer like one.
        StorageError: the disk would not take it.
    """
    folder = _snapshot(name, revision, "model", _MODEL_PATTERNS, _MODEL_EXCEPT, cache, offline, progress)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"The model {name} has no safetensors at the top of its repository (commit {folder.name[:12]}); pickled "
            "weights and other formats are not fetched.",
            remedy="Name a repository that has them; many models have a copy or a branch with safetensors.",
        )
    return folder, folder.name


def fetch_hub_dataset(
    name: str,
    revision: str | None,
    *,
    cache: Path | None = None,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> Path:
    """Folder with the parquet, jsonl, json, csv and tsv files of the data set ``name``; its name is the commit.

    Raises:
        DataError: no such data set or revision, none of its files can be read, or the hub cannot be reached.
        GatedModelError: a licence must be accepted first.
        StorageError: the disk would not take it.
    """
    folder = _snapshot(name, revision, "dataset", _DATA_PATTERNS, (), cache, offline, progress)
    if not any(path.suffix in DATA_SUFFIXES for path in folder.rglob("*")):
        raise DataError(
            f"The data set {name} holds no parquet, jsonl, csv or tsv file.",
            remedy="Data sets that need a script to be read are not run; convert it and name the file.",
        )
    return folder


def _snapshot(
    name: str,
    revision: str | None,
    repo_type: str,
    allow: Sequence[str],
    refuse: Sequence[str],
    cache: Path | None,
    offline: bool,
    progress: ProgressSink,
) -> Path:
    _without_telemetry()
    from huggingface_hub import snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    cache_dir = cache_root(cache) / "hub" if cache is not None or os.environ.get(CACHE_VARIABLE) else None
    try:
        with storage_errors("write", cache_dir or Path("the cache of the hub library")):
            folder = snapshot_download(
                name,
                repo_type=repo_type,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=list(allow),
                ignore_patterns=list(refuse) or None,
                endpoint=endpoint,
                library_name="slmops",
                tqdm_class=_reporting_bar(f"fetch {name}", progress),
                max_workers=4,
            )
    except SlmopsError:
        raise
    except (OSError, ValueError, _transport_error()) as error:
        raise _explained(error, name, revision, repo_type, endpoint, offline) from error
    commit = Path(folder).name
    if revision is None or not _COMMIT.fullmatch(revision):
        logger.info("%s@%s is commit %s.", name, revision or "main", commit)
    return Path(folder)


def _without_telemetry() -> None:
    """Before the library is imported through the environment, afterwards through its constant."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        from huggingface_hub import constants
    except ImportError:
        raise MissingExtraError("A model or data set from a hub (hf:)", "train") from None
    constants.HF_HUB_DISABLE_TELEMETRY = True


def _transport_error() -> type[Exception]:
    """The base of all errors of the HTTP library that the hub library happens to use (it has changed twice)."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _explained(
    error: Exception, name: str, revision: str | None, repo_type: str, endpoint: str | None, offline: bool
) -> SlmopsError:
    """Our error for one of the library's: what happened, with the value, and what to do."""
    from huggingface_hub import constants, errors

    hub = endpoint or constants.ENDPOINT
    what = "model" if repo_type == "model" else "data set"
    not_found: Callable[..., SlmopsError] = ModelNotFoundError if repo_type == "model" else DataError
    failed: Callable[..., SlmopsError] = ModelError if repo_type == "model" else DataError
    at = f"{name}@{revision}" if revision else name
    prefix = "" if repo_type == "model" else "datasets/"
    causes = _chain(error)
    status = next((e.response.status_code for e in causes if isinstance(e, errors.HfHubHTTPError)), None)
    if any(isinstance(e, errors.GatedRepoError) for e in causes):
        return GatedModelError(
            f"The {what} {name} is gated: its owner wants a licence accepted first (HTTP {status}).",
            remedy=f"Accept the licence on its page, {hub}/{prefix}{name}, and set HF_TOKEN to a token of yours.",
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in causes):
        return not_found(
            f"The {what} {name} has no revision {revision!r} at {hub}.", remedy="Name a branch, a tag or a commit."
        )
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in causes):
        return not_found(
            f"There is no {what} {name} at {hub} (HTTP {status}).",
            remedy="Check the spelling of OWNER/NAME; for a private one set HF_TOKEN.",
        )
    if offline:
        return not_found(
            f"The {what} {at} is not in the cache, or not all of it, and this run is offline.",
            remedy="Run once with a network (and without HF_HUB_OFFLINE), or name a local path.",
        )
    if status is not None:
        remedy = "Check HF_TOKEN." if status in {401, 403} else "Try again later, or name a local path."
        return failed(f"{hub} answered HTTP {status} when asked for the {what} {at}.", remedy=remedy)
    if any(isinstance(e, (_transport_error(), ConnectionError)) for e in causes):
        return failed(
            f"{hub} could not be reached for the {what} {at}: {_reason(causes)}.",
            remedy="Check the network, the proxy and HF_ENDPOINT; with all files in the cache, set HF_HUB_OFFLINE=1.",
        )
    return failed(
        f"{hub} does not answer as a hub does when asked for the {what} {at}: {_reason(causes)}.",
        remedy="Check HF_ENDPOINT and the proxy.",
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, outermost first."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


def _reason(causes: Sequence[BaseException]) -> str:
    last = causes[-1]
    return (str(last).strip() or type(last).__name__).splitlines()[0].rstrip(".")


def _reporting_bar(task: str, progress: ProgressSink) -> type[Any]:
    """A class that stands in for tqdm: it draws nothing and emits events for the bar that counts received bytes."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.received = int(options.get("initial") or 0)
            self.counts_bytes = options.get("unit") == "B" and "Downloading" in str(options.get("desc"))
            self.reported_s = 0.0
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            total = int(self.total or 0)
            now_s = time.monotonic()
            if self.counts_bytes and (now_s - self.reported_s > 0.1 or self.received == total):
                self.reported_s = now_s
                progress(Progress(task, self.received, total or None, "bytes"))
            return None

    return Bar
