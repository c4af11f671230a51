"""A recipe as an Azure ML pipeline job: environment, data assets, compute, and one step a stage.

Every step runs ``slmops run recipe.yaml --until STAGE`` on the store that the step before left, so what happens there
is what happens here. The job is written as the YAML that the official client reads, beside all that it uploads: a
folder that a person can look at, and submit by hand.

Not covered: secrets. An API key does not travel; a teacher that needs one cannot be asked from there.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from slmops.errors import RecipeError
from slmops.recipe import AzureMLConfig, Recipe

STAGES = ("data", "teacher", "answers", "search", "student", "evaluate", "package")
"""Where a run can be stopped, in their order."""
RECIPE_NAME = "recipe.yaml"
JOB_NAME = "job.yml"
LAST = "package"
_FILES = (
    ("data", "train", "train"),
    ("data", "validation", "validation"),
    ("data", "test", "test"),
    ("teacher", "model", "teacher_model"),
    ("student", "model", "student_model"),
    ("distill", "unlabelled", "unlabelled"),
)
"""Section, key, and the name of the job's input, where the value is a path on this machine."""


def stages_of(recipe: Recipe) -> list[str]:
    return [stage for stage in STAGES if stage != "search" or recipe.search is not None]


def uploads_of(recipe: Recipe) -> dict[str, tuple[str, Path]]:
    """Input name -> the recipe's key and the file or folder here that goes with the job."""
    raw = recipe.model_dump(mode="json", by_alias=True)
    found = {}
    for section, key, name in _FILES:
        value = raw[section][key]
        if value is not None and ":" not in value:
            found[name] = (f"{section}.{key}", Path(value))
    if recipe.train.forgetting is not None:
        found["general"] = ("train.forgetting.data", Path(recipe.train.forgetting.data))
    if recipe.train.preferences is not None:
        found["preferences"] = ("train.preferences.file", Path(recipe.train.preferences.file))
    if recipe.compress.calibration.data is not None:
        found["calibration"] = ("compress.calibration.data", Path(recipe.compress.calibration.data))
    return found


def extras_of(recipe: Recipe) -> list[str]:
    """What of slmops has to be installed there."""
    wanted = {
        "train": True,
        "search": recipe.search is not None,
        "olive": recipe.train.engine == "olive",
        "preferences": recipe.train.preferences is not None,
    }
    return [extra for extra, needed in wanted.items() if needed]


def command_of(stage: str, uploads: Mapping[str, tuple[str, Path]], *, first: bool, wheel: str | None = None) -> str:
    """The shell command of one step. Inputs and outputs are named as Azure ML fills them in.

    The store is worked on beside the step and copied out whatever happens, so that a step that fails, or a gate that
    does not hold, leaves what it finished.
    """
    sets = " ".join(f'--set "{key}=${{{{inputs.{name}}}}}"' for name, (key, _) in uploads.items())
    run = f'slmops run "${{{{inputs.recipe}}}}" --store store {sets}'.rstrip()
    run += ' --out "${{outputs.result}}"' if stage == LAST else f" --until {stage}"
    parts = [f"python -m pip install --quiet '{wheel}'"] if wheel else []
    parts += ["mkdir -p store"] if first else ['cp -r "${{inputs.store}}" store']
    parts += [f'{{ {run}; code=$?; cp -r store/. "${{{{outputs.store}}}}"; exit $code; }}']
    return " && ".join(parts)


def job_of(recipe: Recipe, config: AzureMLConfig, *, wheel: str | None = None) -> dict[str, Any]:
    """The pipeline job as the client's YAML has it. Paths are those of :func:`stage_files`. Pure.

    ``wheel``: name of a wheel that is uploaded with each step's code and installed first.
    """
    uploads = uploads_of(recipe)
    inputs: dict[str, Any] = {"recipe": {"type": "uri_file", "path": RECIPE_NAME}}
    for name, (_, path) in uploads.items():
        kind = "uri_folder" if path.is_dir() else "uri_file"
        inputs[name] = {"type": kind, "path": str(path), "mode": "download"}
    stages = stages_of(recipe)
    steps = {}
    for number, stage in enumerate(stages):
        first = number == 0
        step_inputs = {name: f"${{{{parent.inputs.{name}}}}}" for name in inputs}
        step: dict[str, Any] = {
            "type": "command",
            "display_name": stage,
            "command": command_of(stage, uploads, first=first, wheel=_with_extras(wheel, recipe) if wheel else None),
            "environment": {"image": config.image, "conda_file": _conda(recipe, config, wheel)},
            "environment_variables": {"DO_NOT_TRACK": "1"},
            "inputs": step_inputs,
            "outputs": {"store": {"type": "uri_folder", "mode": "upload"}},
        }
        if not first:
            step["inputs"]["store"] = {
                "path": f"${{{{parent.jobs.{stages[number - 1]}.outputs.store}}}}",
                "mode": "download",
            }
        if stage == LAST:
            step["outputs"] = {
                "store": "${{parent.outputs.store}}",
                "result": "${{parent.outputs.result}}",
            }
        if stage in config.computes:
            step["compute"] = f"azureml:{config.computes[stage]}"
        if wheel:
            step["code"] = "code"
        steps[stage] = step
    return {
        "$schema": "https://azuremlschemas.azureedge.net/latest/pipelineJob.schema.json",
        "type": "pipeline",
        "display_name": recipe.name,
        "experiment_name": config.experiment or recipe.name,
        "settings": {"default_compute": f"azureml:{config.compute}", "force_rerun": False},
        "inputs": inputs,
        "outputs": {name: {"type": "uri_folder", "mode": "upload"} for name in ("store", "result")},
        "jobs": steps,
    }


def stage_files(recipe: Recipe, config: AzureMLConfig, folder: Path) -> Path:
    """Write job, recipe and wheel into ``folder``; the job's path.

    Raises:
        RecipeError: a stage of ``azureml.computes`` that there is not, a file that is missing, or a key that would have
            to travel.
    """
    check(recipe, config)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = _wheel(config)
    if wheel is not None:
        (folder / "code").mkdir()
        shutil.copyfile(wheel, folder / "code" / wheel.name)
    (folder / RECIPE_NAME).write_text(yaml.safe_dump(travelling_recipe(recipe), sort_keys=False), "utf-8")
    job = job_of(recipe, config, wheel=wheel.name if wheel else None)
    (folder / JOB_NAME).write_text(yaml.safe_dump(job, sort_keys=False), "utf-8")
    return folder / JOB_NAME


def check(recipe: Recipe, config: AzureMLConfig) -> None:
    """What can be known to be wrong before anything is sent. Raises :class:`RecipeError`."""
    if unknown := sorted(set(config.computes) - set(stages_of(recipe))):
        raise RecipeError(
            f"azureml.computes names {unknown[0]}, which is no stage of this recipe.",
            remedy=f"Its stages are {', '.join(stages_of(recipe))}.",
        )
    for key, path in uploads_of(recipe).values():
        if not path.exists():
            raise RecipeError(f"{key} is {path}, which is not there.", remedy="Only what is here can be uploaded.")
    for key, value in _left_behind(recipe).items():
        raise RecipeError(
            f"{key} is {value}, which is on this machine and does not travel to Azure ML.",
            remedy="Leave it out, or run the recipe here.",
        )
    if recipe.teacher.api_key_env is not None:
        raise RecipeError(
            f"teacher.api_key_env is {recipe.teacher.api_key_env}, but keys do not travel to Azure ML.",
            remedy="Run it here up to the answers first, or let a local model teach.",
        )
    wheel = _wheel(config)
    if wheel is not None and not wheel.is_file():
        raise RecipeError(f"azureml.requirement is {wheel}, which is not there.", remedy="Build it: pip wheel .")


def _left_behind(recipe: Recipe) -> dict[str, str]:
    """Key -> value of what lies here and is not uploaded."""
    judge = recipe.teacher.judge
    found = {
        "train.loss": recipe.train.loss,
        "train.tracking_folder": recipe.train.tracking_folder,
        "teacher.prices": recipe.teacher.prices if isinstance(recipe.teacher.prices, str) else None,
        "teacher.judge.prices": judge.prices if judge is not None and isinstance(judge.prices, str) else None,
        **{
            f"teacher[{number}].model": teacher.model
            for number, teacher in enumerate(recipe.teachers, start=1)
            if ":" not in teacher.model
        },
    }
    return {key: value for key, value in found.items() if value is not None}


def travelling_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without this machine's paths: what is uploaded is named by ``--set`` in each step."""
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    raw.pop("azureml", None)
    for key, path in uploads_of(recipe).values():
        section = raw
        *parents, last = key.split(".")
        for parent in parents:
            section = section[parent]
        section[last] = path.name
    return raw


def _wheel(config: AzureMLConfig) -> Path | None:
    return Path(config.requirement) if config.requirement.endswith(".whl") else None


def _with_extras(name: str, recipe: Recipe) -> str:
    return f"{name}[{','.join(extras_of(recipe))}]"


def _conda(recipe: Recipe, config: AzureMLConfig, wheel: str | None) -> dict[str, Any]:
    """The same Python as here: a stage's key holds the code's version, which differs a little between Pythons."""
    python = f"python={sys.version_info.major}.{sys.version_info.minor}"
    pip = [] if wheel else [_with_extras(config.requirement, recipe)]
    return {
        "name": "slmops",
        "channels": ["conda-forge"],
        "dependencies": [python, "pip", *([{"pip": pip}] if pip else [])],
    }
