"""``student`` and ``distill``: the small model, and what it learns from its teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from slmops.recipe.section import Section, Weight


class StudentConfig(Section):
    """Which model learns: a named one, or one cut out of the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)

    model: str | None = Field(None, description="a model to start from; null: cut from the teacher")
    from_: Literal["teacher"] = Field("teacher", alias="from")
    layers: Annotated[int, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    hidden_size: Annotated[int, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    intermediate_size: Annotated[int, Field(gt=0)] | None = None
    vocabulary: Literal["trim", "keep"] = "trim"


class LossWeights(Section):
    """How much each signal counts; the loss is their weighted sum."""

    gold: Weight | None = Field(
        None,
        description="cross-entropy with the labels of the data (open tasks: with the teacher's text); null: 0.3 for "
        "closed label sets, 1 for open tasks",
    )
    forward_kl: Weight | None = Field(
        None,
        description="from the teacher's softened distribution; null: 0.7 for closed label sets, 0 for open tasks",
    )
    reverse_kl: Weight = Field(0.0, description="the same the other way: the student keeps to what the teacher says")
    jsd: Weight = Field(0.0, description="generalized Jensen-Shannon divergence, see jsd_beta")
    hidden: Weight | None = Field(
        None,
        description="distance to the teacher's hidden states; null: 1 for closed label sets with a local teacher, 0 "
        "for open tasks",
    )
    attention: Weight = Field(0.0, description="where the teacher's heads look (open tasks)")
    uld: Weight = Field(
        0.0, description="sorted probabilities, for a teacher whose tokenizer is another one (open tasks)"
    )


DISTRIBUTION_LOSSES = ("forward_kl", "reverse_kl", "jsd")
"""Signals that compare token by token, or label by label."""
MAX_SIGNAL_BYTES = 300
"""What the kept distribution of a token may take on disk."""


class DistillConfig(Section):
    """What of the teacher's knowledge is used in training the student."""

    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="null: 2 for closed label sets, 1 for open tasks"
    )
    losses: LossWeights = LossWeights()
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    top_k: Annotated[int, Field(gt=0, le=49)] | None = Field(
        48,
        description="token probabilities that are kept on disk, with the mass of the rest; null: all of them, from "
        "the teacher beside the student in every step (open tasks)",
    )
    layer_map: dict[int, int] | None = Field(
        None, description="student layer: teacher layer, counted from 0 (hidden, attention); null: evenly spread"
    )
    on_policy_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of rows whose answer the student writes and the teacher judges (open tasks)"
    )
    on_policy_tokens: Annotated[int, Field(gt=0)] = Field(64, description="longest answer that the student writes so")
    teacher_weights: Literal["confidence", "equal"] = Field(
        "confidence", description="several teachers: weighed by each example's confidence, or equally"
    )
    transfer_rows: Annotated[float, Field(ge=0)] = Field(
        0.0, description="unlabelled variations of the training texts per row, labelled by the teacher (closed sets)"
    )
    unlabelled: str | None = Field(
        None,
        description="file of further texts that nobody labelled, for a local teacher to label (closed sets), and to "
        "read where teacher.adapt_text_epochs is set",
    )

    def weights(self, *, closed: bool) -> dict[str, float]:
        """Signal -> weight of those that count. ``hidden`` of closed sets is left out where it is null: it depends on
        what the teacher shows.
        """
        given = self.losses.model_dump()
        given["gold"] = (0.3 if closed else 1.0) if given["gold"] is None else given["gold"]
        given["forward_kl"] = (0.7 if closed else 0.0) if given["forward_kl"] is None else given["forward_kl"]
        return {name: weight for name, weight in given.items() if weight}

    def softness(self, *, closed: bool) -> float:
        """The temperature."""
        return self.temperature or (2.0 if closed else 1.0)

    @property
    def compares_tokens(self) -> bool:
        """Whether an open task needs the teacher's probabilities of tokens."""
        return bool(self.weights(closed=False).keys() & {*DISTRIBUTION_LOSSES, "uld"}) or self.on_policy_share > 0

    @property
    def online(self) -> bool:
        """Whether the teacher stands beside the student while an open task is learnt."""
        shown = self.weights(closed=False).keys() & {"hidden", "attention"}
        return bool(shown) or self.on_policy_share > 0 or (self.compares_tokens and self.top_k is None)

    @property
    def cached(self) -> bool:
        """Whether an open task is learnt from token probabilities that the teacher left on disk."""
        return self.compares_tokens and not self.online

    @model_validator(mode="after")
    def _check_weights(self) -> DistillConfig:
        given = self.losses.model_dump()
        if all(weight == 0 for weight in given.values()):
            raise ValueError("distill.losses: all weights are 0, so nothing would be learnt")
        return self
