"""``POST /v1/feedback``: what people say of an answer, kept beside it.

Guarantees: feedback on an answer that nobody knows is refused with 404; saying the same again changes nothing, and
saying something else replaces what the same subject said before.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool

from slmops.artifacts.events import Feedback
from slmops.errors import SlmopsError
from slmops.serve.errors import ApiError
from slmops.serve.openapi import FeedbackTaken, answers_with
from slmops.serve.recording import Recorder
from slmops.serve.requests import Body

MOST_CHARACTERS = 32_000
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]


class FeedbackRequest(Body):
    """``id``: the answer's, or the ``X-Request-Id`` of a response with one answer (``ID-0``, ``ID-1`` of one with
    several)."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    correction: Text | None = None
    comment: Text | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="whose feedback it is; kept as a hash")

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackRequest:
        if self.score is None and not self.correction and not self.comment:
            raise ValueError("give a score from 0 to 1, a correction or a comment")
        return self


def add_feedback(app: FastAPI, recorder: Recorder | None) -> None:
    """The path, which says so where nothing is recorded."""

    @app.post("/v1/feedback", responses=answers_with(FeedbackTaken, 400, 404, 413, 503))
    async def feedback(body: FeedbackRequest) -> dict[str, Any]:
        if recorder is None:
            raise ApiError(
                404, "This server records nothing, so there is no answer to give feedback on.", code="not_recording"
            )
        given = Feedback(body.id, time.time(), body.score, body.correction or None, body.comment or None, body.user)
        try:
            known = await run_in_threadpool(recorder.feedback, given)
        except SlmopsError as error:
            raise ApiError(
                503, f"The feedback cannot be kept now: {error.message}", kind="server_error", code="storage",
                headers={"Retry-After": "5"},
            ) from None  # fmt: skip
        if not known:
            raise ApiError(404, f"No answer here has the id '{body.id}'.", param="id", code="answer_not_found")
        return {"object": "feedback", "id": body.id}
