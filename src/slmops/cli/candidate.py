"""From a candidate that a person names to the trial of it, and to what has been decided of it before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slmops.errors import UsageError

if TYPE_CHECKING:
    from slmops.rollout import Policy
    from slmops.serve.candidate.rollout import Rollout


def rollout_of(bundle: Path, candidate: Path, *, policy: Path | None, folder: Path | None) -> Rollout | None:
    """The rollout of ``candidate`` beside ``bundle``, with what was decided so far; None where both are one version.

    ``folder``: where its decisions are kept; None: beside the candidate.

    Raises:
        UsageError: one of both has no manifest, or they answer in different forms.
        CorruptArtifactError, StorageError: as the rollout's book.
    """
    from slmops.package import check_digests, resolve_model_folder
    from slmops.runtime.description import ModelDescription
    from slmops.serve.candidate.book import ROLLOUT, Book, pair_name
    from slmops.serve.candidate.rollout import Rollout

    folders = [resolve_model_folder(one) for one in (bundle, candidate)]
    old, new = (check_digests(one) for one in (bundle, candidate))
    if old is None or new is None:
        bare = bundle if old is None else candidate
        raise UsageError(f"{bare} is a bare model folder, which has no version.", remedy="Name bundles or variants.")
    if new == old:
        return None
    forms = [ModelDescription.read(one).form for one in folders]
    if forms[0] != forms[1]:
        raise UsageError(f"A {forms[1]} cannot take over from a {forms[0]}.", remedy="Name a bundle of the same task.")
    book = Book((folder or candidate.resolve().parent / ROLLOUT) / pair_name(old, new))
    return Rollout(book, book.begin(old, new, read_policy(policy)))


def read_policy(path: Path | None) -> Policy:
    """The policy in a YAML file; the default one without a file.

    Raises:
        UsageError: it is not there, no mapping, or says what cannot be.
    """
    import yaml

    from slmops.rollout import Policy

    if path is None:
        return Policy()
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"The policy {path} cannot be read: {error}.", remedy="Name a YAML file.") from None
    if not isinstance(raw, dict):
        raise UsageError(f"The policy {path} holds no keys.", remedy="For example: shares: [0.05, 0.5]")
    return Policy.from_json(raw)
