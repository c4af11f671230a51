"""The official client of Azure ML (azure-ai-ml), asked to run a recipe.

Guarantees: nothing is sent unless the recipe says ``privacy: remote``; the job is validated by the client before
anything is uploaded; calling again while the job runs, or after it ended well, attaches to it instead of starting
another; the client's telemetry is off.

Not covered: making workspaces and clusters, and stopping the job: a call that is interrupted leaves it running.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.errors import MissingExtraError, PrivacyError, RecipeError, SlmopsError, UsageError
from slmops.pipeline.azureml.fetch import take_artifacts, take_result
from slmops.pipeline.azureml.job import JOB_NAME, stage_files, stages_of, uploads_of
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import AzureMLConfig, Recipe, recipe_json
from slmops.store import Store, code_version
from slmops.trust import digest_file, digest_json, digest_tree, tree_digest

TASK = "azureml"
POLL_S = 15.0
SCOPE = "https://management.azure.com/.default"
ENDED = {"Completed", "Failed", "Canceled", "NotResponding"}
UNDER_WAY = {"NotStarted", "Starting", "Provisioning", "Preparing", "Queued", "Running", "Finalizing"}


@dataclass(frozen=True)
class RemoteRun:
    """``report`` is the content of ``folder/report.json``; ``artifacts`` are those that are new in this store."""

    job: str
    report: Mapping[str, Any]
    folder: Path
    artifacts: int

    @property
    def passed(self) -> bool:
        return bool(self.report["passed"])


def run_on_azureml(
    recipe: Recipe,
    store: Store,
    *,
    out: Path | None = None,
    progress: ProgressSink = ignore,
    make_credential: Callable[[], Any] | None = None,
    poll_s: float = POLL_S,
) -> RemoteRun:
    """Submit ``recipe`` as a pipeline job, wait for its end, and fetch what it made.

    Raises:
        MissingExtraError: azure-ai-ml is not installed.
        RecipeError: the recipe does not say where, or cannot be run there.
        PrivacyError: the recipe does not allow that rows leave this machine.
        UsageError: there are no credentials for Azure, or they are refused.
        SlmopsError: the client refuses the job, or the job did not end well.
    """
    config = recipe.azureml
    if config is None:
        raise RecipeError("The recipe has no azureml section.", remedy="Give it azureml.compute, and a workspace.")
    if recipe.privacy != "remote":
        raise PrivacyError(
            "A run on Azure ML would leave this machine: rows, recipe and local models are uploaded.",
            remedy="Set privacy: remote if they may.",
        )
    _check_installed()
    folder = store.root / "azureml" / recipe.name
    path = stage_files(recipe, config, folder / "upload")
    job = load_and_validate(path)
    client = _client(config, make_credential or _default_credential)
    name = _submitted(client, job, recipe, folder)
    _watch(client, name, recipe, progress, poll_s)
    fetched = folder / "fetched"
    with _told("The job's outputs could not be fetched"):
        for output in ("store", "result"):
            client.jobs.download(name, output_name=output, download_path=str(fetched))
    artifacts = take_artifacts(fetched / "named-outputs" / "store", store)
    place = out or store.root / "runs" / recipe.name
    report = take_result(fetched / "named-outputs" / "result", place)
    return RemoteRun(name, report, place, artifacts)


def load_and_validate(path: Path) -> Any:
    """The job at ``path`` as the client reads it; nothing is sent.

    Raises:
        RecipeError: the client finds something wrong with it.
    """
    _check_installed()
    # It warns of its own experimental classes whenever it is imported.
    logging.getLogger("azure.ai.ml._utils._experimental").setLevel(logging.ERROR)
    from azure.ai.ml import load_job
    from azure.ai.ml.exceptions import ValidationException
    from marshmallow import ValidationError

    try:
        job = load_job(path)
        found = job._validate()
    except (ValidationException, ValidationError) as error:
        raise RecipeError(f"Azure ML's client refuses the job: {error}", remedy=f"Look at {path}.") from None
    if not found.passed:
        problems = "; ".join(f"{where}: {what}" for where, what in found.error_messages.items())
        raise RecipeError(f"Azure ML's client refuses the job: {problems}.", remedy=f"Look at {path}.")
    return job


def run_key(recipe: Recipe) -> str:
    """What makes two submissions the same job: recipe, contents of what is uploaded, and code."""
    uploads = {
        name: tree_digest(digest_tree(path)) if path.is_dir() else digest_file(path).sha256
        for name, (_, path) in uploads_of(recipe).items()
    }
    return digest_json({"recipe": recipe_json(recipe), "uploads": uploads, "code": code_version("slmops")})


def _check_installed() -> None:
    from importlib.util import find_spec

    for name in ("azure.ai.ml", "azure.identity"):
        try:
            there = find_spec(name) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            raise MissingExtraError(f"slmops run --on azureml (it needs {name})", "azureml")


def _default_credential() -> Any:
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential(exclude_interactive_browser_credential=True)


def _client(config: AzureMLConfig, make_credential: Callable[[], Any]) -> Any:
    from azure.ai.ml import MLClient
    from azure.core.exceptions import ClientAuthenticationError

    place = _workspace(config)
    credential = make_credential()
    try:
        credential.get_token(SCOPE)
    except ClientAuthenticationError as error:
        said = str(error).strip().splitlines()
        raise UsageError(
            f"There are no credentials for Azure that work: {said[0] if said else type(error).__name__}",
            remedy="Log in with `az login`, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET.",
        ) from None
    return MLClient(credential, *place, enable_telemetry=False, show_progress=False)


def _workspace(config: AzureMLConfig) -> tuple[str, str, str]:
    """Subscription, resource group, workspace: from the recipe, else from ``config.json`` here or in ``.azureml``."""
    named = {
        "subscription_id": config.subscription_id,
        "resource_group": config.resource_group,
        "workspace_name": config.workspace,
    }
    for path in (Path("config.json"), Path(".azureml") / "config.json"):
        if all(named.values()) or not path.is_file():
            continue
        try:
            told = json.loads(path.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue
        if isinstance(told, dict):
            named = {key: value or told.get(key) for key, value in named.items()}
    missing = [key for key, value in named.items() if not value]
    if missing:
        raise RecipeError(
            f"Which workspace? {' and '.join(missing)} is not known.",
            remedy="Set azureml.subscription_id, resource_group and workspace, or put the workspace's config.json "
            "here.",
        )
    return str(named["subscription_id"]), str(named["resource_group"]), str(named["workspace_name"])


def _submitted(client: Any, job: Any, recipe: Recipe, folder: Path) -> str:
    """The name of the job of this recipe: one that is under way or ended well, else a new one."""
    note, key = folder / "job.json", run_key(recipe)
    earlier = json.loads(note.read_text("utf-8")) if note.exists() else {}
    if earlier.get("key") == key and _status(client, earlier["name"]) in {"Completed", *UNDER_WAY}:
        return str(earlier["name"])
    with _told("Azure ML did not take the job"):
        submitted = client.jobs.create_or_update(job)
    note.write_text(json.dumps({"key": key, "name": submitted.name, "file": JOB_NAME}), "utf-8")
    return str(submitted.name)


def _status(client: Any, name: str) -> str | None:
    from azure.core.exceptions import ResourceNotFoundError

    try:
        with _told("Azure ML does not answer"):
            return _word(client.jobs.get(name).status)
    except ResourceNotFoundError:
        return None


def _word(status: Any) -> str:
    """The status as the service says it: the client gives some as its own enumeration."""
    return str(getattr(status, "value", status))


def _watch(client: Any, name: str, recipe: Recipe, progress: ProgressSink, poll_s: float) -> None:
    """Wait for the job's end.

    Raises:
        SlmopsError: it did not end well, and left nothing.
    """
    stages = stages_of(recipe)
    while True:
        status = _status(client, name)
        with _told("Azure ML does not answer"):
            steps = {step.display_name: _word(step.status) for step in client.jobs.list(parent_job_name=name)}
        done = sum(steps.get(stage) == "Completed" for stage in stages)
        progress(Progress(TASK, done, len(stages), "stages", f"{name}: {status}"))
        if status in ENDED or status is None:
            break
        time.sleep(poll_s)
    # A gate that does not hold fails the last step, after the report was written.
    failed = [stage for stage in stages if steps.get(stage) == "Failed"]
    if status != "Completed" and failed != [stages[-1]]:
        raise SlmopsError(
            f"The job {name} ended as {status}" + (f" in {failed[0]}." if failed else "."),
            remedy="Its logs are in the workspace; run again for a new job.",
        )


class _told:  # noqa: N801 - reads as a clause
    """Errors of the client's transport and service as ours; what is not there stays what it is."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        from azure.ai.ml.exceptions import MlException
        from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError

        if isinstance(error, ResourceNotFoundError):
            return
        if isinstance(error, AzureError | MlException):
            said = str(error).strip().splitlines()
            problem = UsageError if isinstance(error, ClientAuthenticationError) else SlmopsError
            raise problem(f"{self.what}: {said[0] if said else type(error).__name__}") from error
