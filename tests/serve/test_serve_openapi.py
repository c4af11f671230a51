"""Our own OpenAPI schema, and requests made from it by schemathesis: what is answered is what the schema says.

A bounded number of examples a path, the same in every run. A fault of the server (500) fails, an answer that the schema
does not tell of as well, and so does one of another form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from fakes.tiny_models import write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.serve.app import create_app
from slmops.serve.server import background

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

PATHS = {
    "/health", "/health/live", "/health/ready", "/v1/models", "/v1/models/{model}", "/v1/chat/completions",
    "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/classify", "/v1/feedback",
}  # fmt: skip
BOUNDED = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint, context_tokens=64)
    write_tiny_generator(folder, checkpoint, options=["include_hidden_states=true"])
    with background(create_app(folder, name="talker")) as url:
        yield url


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("labels")
    write_tiny_classifier(folder)
    with background(create_app(folder, name="intents")) as url:
        yield url


def check(case: Any, name: str) -> None:
    # A name of a model that exists, most of the time: otherwise every answer would be that there is none.
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) % 4:
        case.body["model"] = name
    if "model" in (case.path_parameters or {}) and len(case.path_parameters["model"]) % 2:
        case.path_parameters["model"] = name
    response = case.call(timeout=60)  # a busy machine is no fault
    case.validate_response(response, checks=CHECKS)


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
"""Not that every body that fits the schema is taken, nor that every other one is refused: what goes together
(tool_choice and tools, ...) is more than a schema says, and neutral values of unknown parameters are taken."""


def ask_everything(url: str, name: str) -> int:
    """Ask every path with generated bodies; how many requests that were."""
    count = 0
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()

        @BOUNDED
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            nonlocal count
            count += 1
            check(case, name)

        ask()
    return count


def test_a_generator_answers_as_its_schema_says(texts: str) -> None:
    assert ask_everything(texts, "talker") > len(PATHS) * 10


def test_a_classifier_answers_as_its_schema_says(labels: str) -> None:
    assert ask_everything(labels, "intents") > len(PATHS) * 10


def test_the_schema_tells_of_every_path_and_only_of_answers_that_are_given(texts: str) -> None:
    schema = httpx.get(f"{texts}/openapi.json").json()
    assert set(schema["paths"]) == PATHS
    for path in schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert "schema" in operation["responses"]["200"]["content"]["application/json"]
    assert set(schema["components"]["schemas"]["ErrorDetail"]["required"]) == {"message", "type", "param", "code"}
    told = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"tools", "tool_choice", "response_format", "logprobs", "n", "seed", "stop"} <= set(told)
