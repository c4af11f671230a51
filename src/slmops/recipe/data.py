"""``data``: which rows, how they are read, and how they are divided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slmops.recipe.section import Section

Encoding = Literal["utf-8", "utf-8-sig", "utf-16", "latin-1"]


class SplitConfig(Section):
    """How rows are divided. Shares are of all rows left after cleaning; the rest is for training."""

    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    stratify: str | None = Field(None, description="column whose shares are kept; the target for closed label sets")


class DataConfig(Section):
    """Where the rows are and how columns become prompt and answer."""

    train: str = Field(
        description="csv, jsonl, parquet, txt or md file, or hf:owner/name@revision[:split[slice]]; with text also a "
        "folder of txt and md files"
    )
    validation: str | None = Field(None, description="a file of its own instead of a part of train")
    test: str | None = Field(None, description="a file of its own instead of a part of train")
    input: str = Field("{text}", description="template over columns")
    target: str | None = Field("{label}", description="template over columns; null where only the teacher answers")
    messages: str | None = Field(None, description="column with chat messages, instead of input and target")
    text: str | None = Field(
        None,
        description="template over columns of running text, instead of input and target: every token is learnt "
        "(slmops train, task: generation)",
    )
    documents: Literal["paragraph", "section", "file"] | None = Field(
        None,
        description="what one document of a txt or md file is; null: a section of an md file (from a heading of the "
        "first or second level on), a paragraph of a txt file, a whole file of a folder",
    )
    system: str | None = Field(None, description="system message put before every row")
    id: str | None = Field(None, description="column with unique ids")
    encoding: Encoding = "utf-8"
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="use so many rows, drawn evenly with the seed")
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9, description="Jaccard similarity of character 5-grams from which two rows count as one; null: exact only"
    )
    max_row_bytes: Annotated[int, Field(gt=0)] = 1_000_000
    split: SplitConfig = SplitConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_running_text(cls, raw: Any) -> Any:
        """Running text has no answer, so there data.target is null wherever it is not given."""
        if isinstance(raw, Mapping) and raw.get("text") is not None and "target" not in raw:
            return {**raw, "target": None}
        return raw

    @model_validator(mode="after")
    def _check_running_text(self) -> DataConfig:
        if self.text is None:
            return self
        for key in ("input", "target", "messages", "system"):
            if (value := getattr(self, key)) is not None and (key, value) != ("input", "{text}"):
                raise ValueError(
                    f"data.text is running text, of which every token is learnt, and data.{key} is {value!r}: leave "
                    f"data.{key} out, or data.text where there are questions and answers"
                )
        return self
