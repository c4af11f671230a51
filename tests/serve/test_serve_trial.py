"""A candidate within a server in operation: metrics, records and reloads know which version answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from fakes.tiny_models import write_tiny_classifier
from slmops.artifacts.events import Answered, Feedback
from slmops.rollout import Policy
from slmops.serve.candidate.book import Book
from slmops.serve.candidate.rollout import Rollout
from slmops.serve.engine import Engine
from slmops.serve.operate import ServeOptions, operate
from slmops.serve.reload import Version
from slmops.serve.server import background

OLD, NEW = "a" * 64, "b" * 64
QUICK = Policy(
    shares=(0.5,),
    shadow_requests=20,
    step_requests=10,
    most_requests=400,
    answered_margin=0.2,
    quick_margin=0.5,
    slow_factor=50,
    score_margin=0.3,
    least_feedback=10,
)


class Records:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.answers: list[Answered] = []

    def observe(self, read: Callable[[], Sequence[Answered]]) -> None:
        self.answers.extend(read())

    def feedback(self, given: Feedback) -> bool:
        return any(one.id == given.id for one in self.answers)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing to close."""


def test_a_trial_is_counted_by_version_and_ends_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_classifier(folder)
    book = Book(tmp_path / "rollout")
    rollout = Rollout(book, book.begin(OLD, NEW, QUICK))
    records = Records()

    def load(source: str) -> tuple[Version, Engine]:
        return Version(source, folder, {"old": OLD, "new": NEW}[source]), Engine.open(folder, threads=1)

    app = operate(
        "old", load, ServeOptions("intents"), first=load("old"), beside=(rollout, *load("new")), recorder=records
    )
    with background(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        sent = 0
        refused = client.post("/admin/reload")
        assert refused.status_code in (403, 409)
        deadline = time.monotonic() + 60
        while rollout.running and time.monotonic() < deadline:
            answer = client.post("/v1/classify", json={"input": f"a card {sent}", "user": f"caller {sent}"})
            sent += 1
            assert answer.status_code == 200
            assert len(answer.headers.get_list("x-request-id")) == 1
            assert answer.headers["x-slmops-version"] in (OLD[:12], NEW[:12])
            time.sleep(0.01)
        assert rollout.state.outcome == "over"
        last = client.post("/v1/classify", json={"input": "a card"})
        assert last.headers["x-slmops-version"] == NEW[:12]
        metrics = client.get("/metrics").text
    counted = {
        version: sum(
            float(line.rsplit(" ", 1)[1])
            for line in metrics.splitlines()
            if line.startswith("slmops_requests_total")
            and f'version="{version[:12]}"' in line
            and "/v1/classify" in line
        )
        for version in (OLD, NEW)
    }
    assert min(counted.values()) > 0
    assert sum(counted.values()) == sent + 1, "what is asked in the shadow is not counted"
    assert len(records.answers) == sent + 1, "nor recorded"
    assert {one.version for one in records.answers} == {OLD, NEW}
