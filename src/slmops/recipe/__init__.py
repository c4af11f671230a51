"""The one file that a user writes.

:func:`load_recipe` turns YAML into a :class:`Recipe`: typed, checked as a whole, every error with file, line, value
and remedy. Paths in a recipe are relative to the recipe's folder; paths given by ``--set`` are relative to the
working directory. :func:`recipe_schema` exports the JSON Schema for editors.
"""

from __future__ import annotations

from slmops.recipe.compress import (
    CALIBRATED,
    CalibrationConfig,
    CompressConfig,
    FormatConfig,
    FormatName,
    GgufQuantization,
    PruneConfig,
    QuantizeConfig,
    RecoverConfig,
    SparsityConfig,
)
from slmops.recipe.data import DataConfig, SplitConfig
from slmops.recipe.distill import DISTRIBUTION_LOSSES, DistillConfig, LossWeights, StudentConfig
from slmops.recipe.evaluate import (
    BenchmarkConfig,
    BudgetConfig,
    DriftConfig,
    DriftLimits,
    EvaluateConfig,
    Floor,
    GatesConfig,
    ImproveConfig,
)
from slmops.recipe.paths import anchored_benchmark, portable_recipe
from slmops.recipe.reading import load_recipe, parse_recipe, with_values
from slmops.recipe.search import Range, SearchConfig, Values
from slmops.recipe.section import CLOSED_TASKS, Precision, Task
from slmops.recipe.teacher import JudgeConfig, NewPromptsConfig, PricesConfig, TeacherConfig
from slmops.recipe.train import (
    AzureMLConfig,
    BottleneckConfig,
    ForgettingConfig,
    LoraConfig,
    PreferencesConfig,
    TrainConfig,
)
from slmops.recipe.whole import Recipe, recipe_json, recipe_schema

__all__ = [
    "CALIBRATED",
    "CLOSED_TASKS",
    "DISTRIBUTION_LOSSES",
    "AzureMLConfig",
    "BenchmarkConfig",
    "BottleneckConfig",
    "BudgetConfig",
    "CalibrationConfig",
    "CompressConfig",
    "DataConfig",
    "DistillConfig",
    "DriftConfig",
    "DriftLimits",
    "EvaluateConfig",
    "Floor",
    "ForgettingConfig",
    "FormatConfig",
    "FormatName",
    "GatesConfig",
    "GgufQuantization",
    "ImproveConfig",
    "JudgeConfig",
    "LoraConfig",
    "LossWeights",
    "NewPromptsConfig",
    "Precision",
    "PreferencesConfig",
    "PricesConfig",
    "PruneConfig",
    "QuantizeConfig",
    "Range",
    "Recipe",
    "RecoverConfig",
    "SearchConfig",
    "SparsityConfig",
    "SplitConfig",
    "StudentConfig",
    "Task",
    "TeacherConfig",
    "TrainConfig",
    "Values",
    "anchored_benchmark",
    "load_recipe",
    "parse_recipe",
    "portable_recipe",
    "recipe_json",
    "recipe_schema",
    "with_values",
]
