"""``train`` and ``azureml``: how weights are changed, and where that runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slmops.recipe.section import Section


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021), for ``train.method: lora`` and ``qlora``."""

    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="null: twice the rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="names of the matrices that get adapters, for example [q_proj, v_proj]"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = Field(False, description="learn magnitude and direction apart (Liu et al. 2024)")


class BottleneckConfig(Section):
    """Small networks between the layers' parts, for ``train.method: bottleneck``."""

    size: Annotated[int, Field(gt=0)] = 64
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    after: Literal["both", "feed_forward"] = Field(
        "both",
        description="behind attention and feed-forward (Houlsby et al. 2019), or the latter (Pfeiffer et al. 2020)",
    )


class ForgettingConfig(Section):
    """What training may cost on rows that it is not about."""

    data: str = Field(description="jsonl file of general rows: messages and target, or text")
    budget: Annotated[float, Field(ge=0)] = Field(
        0.02, description="how much the loss on them may rise, as a share of the loss before training"
    )
    max_rows: Annotated[int, Field(gt=0)] = 200


class PreferencesConfig(Section):
    """Pairs of answers of which one is better, learnt after the training (DPO, Rafailov et al. 2023; open tasks)."""

    file: str = Field(description="jsonl: {prompt or messages, chosen, rejected}")
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how much moving away from the model before costs")
    epochs: Annotated[float, Field(gt=0)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    batch_size: Annotated[int, Field(gt=0)] = 4

    @model_validator(mode="before")
    @classmethod
    def _take_a_path(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


class TrainConfig(Section):
    """How a model is trained: the student of a run, and the model of ``slmops train``."""

    engine: Literal["slmops", "olive"] = Field(
        "slmops", description="olive: LoRA or QLoRA by Microsoft Olive, for a student.model on an open task"
    )
    method: Literal["full", "lora", "qlora", "bottleneck"] | None = Field(
        None, description="null: full for students and closed label sets, LoRA for a whole model on an open task"
    )
    lora: LoraConfig = LoraConfig()
    bottleneck: BottleneckConfig = BottleneckConfig()
    loss: str | None = Field(None, description="FILE.py:FUNCTION beside the recipe; null: cross-entropy")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = Field(
        "cosine", description="of the learning rate, after warming up"
    )
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.06, description="share of the steps that warm up")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size: Annotated[int, Field(gt=0)] | None = Field(None, description="rows a step; null: chosen by the task")
    accumulation: Annotated[int, Field(gt=0)] | None = Field(
        None, description="parts that a step's rows are worked through in; null: as many as the free memory asks for"
    )
    checkpoint_activations: bool = Field(False, description="compute inner values again instead of keeping them")
    packing: bool = Field(True, description="rows end to end without padding, what all begin with computed once")
    max_tokens: Annotated[int, Field(gt=0)] = Field(512, description="longer rows are cut, and counted")
    patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="evaluations without improvement before training stops; null: chosen by the task"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: the faster one, measured at the start"
    )
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 200
    forgetting: ForgettingConfig | None = Field(None, description="null: what is forgotten is not measured")
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = Field((), description="where the curves also go")
    tracking_folder: str | None = Field(None, description="null: tracking/NAME in the store")
    processes: Annotated[int, Field(gt=0, le=64)] = Field(1, description="that train together on this machine")
    preferences: PreferencesConfig | None = Field(None, description="a file of pairs, or a section; null: none")


class AzureMLConfig(Section):
    """Where ``slmops run --on azureml`` runs. What is null comes from the ``config.json`` of an Azure ML workspace."""

    subscription_id: str | None = None
    resource_group: str | None = None
    workspace: str | None = None
    compute: str = Field(description="name of a compute cluster")
    computes: dict[str, str] = Field({}, description="stage -> another cluster for it, for example {teacher: gpu}")
    image: str = "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04:latest"
    requirement: str = Field("slmops", description="what is installed there: a package, or the path of a wheel here")
    experiment: str | None = Field(None, description="null: the recipe's name")


OLIVE_KNOWS = frozenset(
    {"engine", "method", "lora", "epochs", "learning_rate", "batch_size", "max_tokens", "precision"}
    | {"checkpoint_every_steps", "preferences"}
)
"""Keys of ``train`` that reach Olive."""
OLIVE_LORA = frozenset({"rank", "alpha", "dropout", "targets"})
