"""Answers under a constraint, and log-probabilities, by every engine of a device on the same tiny weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.children import children_here
from fakes.tiny_models import write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message, Variant, drafting
from slmops.chat import ChatTokenizer
from slmops.compress.gguf_export import export_gguf
from slmops.compress.openvino_export import export_openvino
from slmops.errors import UsageError
from slmops.runtime import Constraint, Delta, GenerationRequest, Generator, abilities_of, open_generator
from slmops.runtime.constraint import ConstraintError, Masks, TokenMask, check_constraint
from slmops.runtime.guide import top_tokens

ABOUT: dict[str, Any] = {"task": "conversation", "name": "tiny", "max_tokens": 256, "system": None}
ASKED = (Message("user", "where is my card?"),)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rom", "Bonn", "Łódź"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
BY_SCHEMA = Constraint("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder, context_tokens=256)
    return folder


@pytest.fixture(scope="module", params=["onnx-genai", "openvino", "llama.cpp"])
def engine(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("model") / "model"
    match request.param:
        case "onnx-genai":
            write_tiny_generator(folder, checkpoint)
        case "openvino":
            pytest.importorskip("openvino")
            with children_here(), drafting(Variant.kind, folder.parent / "v") as draft:
                export_openvino(checkpoint, draft, precision="fp32", **ABOUT)
            folder = folder.parent / "v" / "model"
        case _:
            pytest.importorskip("xllamacpp")
            with drafting(Variant.kind, folder.parent / "v") as draft:
                export_gguf(checkpoint, draft, quantization="f32", **ABOUT)
            folder = folder.parent / "v" / "model"
    generator = open_generator(folder, threads=1)
    yield generator
    generator.close()


def answer(generator: Generator, **options: Any) -> tuple[str, Delta, list[Any]]:
    *pieces, last = generator.stream(GenerationRequest(ASKED, **options))
    whole = [*pieces, last]
    return "".join(piece.text for piece in whole), last, [token for piece in whole for token in piece.tokens]


def test_an_answer_keeps_to_its_schema(engine: Generator) -> None:
    assert {"json_schema", "grammar", "logprobs"} <= abilities_of(engine)
    plain, _, _ = answer(engine, max_tokens=40)
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(plain)
    cities = set()
    for options in ({}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}, {"temperature": 1.5}):
        text, last, _ = answer(engine, max_tokens=80, constraint=BY_SCHEMA, **options)
        value = json.loads(text)
        assert value["city"] in SCHEMA["properties"]["city"]["enum"]  # type: ignore[index]
        assert 1 <= value["days"] <= 9
        assert last.finish_reason == "stop"
        cities.add(value["city"])
    (generation,) = engine.generate([GenerationRequest(ASKED, max_tokens=80, constraint=BY_SCHEMA)])
    assert generation.text == answer(engine, max_tokens=80, constraint=BY_SCHEMA)[0]


def test_a_grammar_with_a_tag_is_followed_and_a_cut_answer_says_so(engine: Generator) -> None:
    call = Constraint(
        "grammar", 'start: tag0 %json {"type": "integer", "minimum": 10, "maximum": 99} tag1', ("<a>", "</a>")
    )
    text, last, _ = answer(engine, max_tokens=30, constraint=call)
    assert text.startswith("<a>")
    assert text.endswith("</a>")
    assert 10 <= int(text[3:-4]) <= 99
    assert last.finish_reason == "stop"
    text, last, _ = answer(engine, max_tokens=2, constraint=call)
    assert last.finish_reason == "length"
    assert "<a>".startswith(text[:3])


def test_log_probabilities_are_the_models_own(engine: Generator, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    chat = ChatTokenizer.load(checkpoint)
    text, last, tokens = answer(engine, max_tokens=12, top_logprobs=3)
    assert len(tokens) == last.completion_tokens == 12
    assert b"".join(token.data for token in tokens).decode("utf-8", "replace") == text
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = chat.encode_prompt(ASKED)
    for token in tokens:
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()
        best = np.argsort(-expected)[:3]
        assert [one.logprob for one in token.top] == pytest.approx(expected[best].tolist(), abs=2e-3)
        assert [one.data for one in token.top] == [chat.bytes_of(int(one)) for one in best]
        assert token.logprob == pytest.approx(float(expected[best[0]]), abs=2e-3)
        ids.append(int(best[0]))
    assert answer(engine, max_tokens=12)[2] == []
    assert [one.top for one in answer(engine, max_tokens=3, top_logprobs=0)[2]] == [(), (), ()]


def test_the_constraint_does_not_colour_what_is_told_of_tokens(engine: Generator) -> None:
    text, _, tokens = answer(engine, max_tokens=80, constraint=BY_SCHEMA, top_logprobs=2)
    assert b"".join(token.data for token in tokens).decode() == text
    assert tokens[0].data[:1] == b"{"
    assert tokens[0].logprob < tokens[0].top[0].logprob  # a random model would have begun in another way
    assert all(token.logprob <= 0 for token in tokens)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "object", "properties": "x"}, "properties must be an object"),
        ({"not": {"type": "string"}}, "not"),
        ({"enum": []}, "nsatisfiable"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"$ref": "http://elsewhere.invalid/x"}, "elsewhere"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_named(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(ConstraintError, match=said):
        check_constraint(Constraint("json_schema", json.dumps(schema)))


def test_no_json_and_no_grammar(checkpoint: Path) -> None:
    for constraint in (
        Constraint("json_schema", "{"),
        Constraint("json_schema", "3"),
        Constraint("grammar", "start: ("),
    ):
        with pytest.raises(ConstraintError):
            check_constraint(constraint)
    masks = Masks(ChatTokenizer.load(checkpoint), 300, frozenset({2}))
    with pytest.raises(ConstraintError):
        masks.start(Constraint("grammar", "start: nothing"))
    wide = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}}
    mask = masks.start(Constraint("json_schema", json.dumps(wide)))
    tokens = ChatTokenizer.load(checkpoint).encode('{"p7')
    with pytest.raises(ConstraintError, match="max is"):
        _follow(mask, tokens)


def _follow(mask: TokenMask, tokens: list[int]) -> None:
    for token in tokens:
        assert mask.allowed()[token]
        mask.push(token)


def test_an_engine_that_cannot_says_so_instead_of_ignoring_it(checkpoint: Path) -> None:
    generator = open_generator(checkpoint, threads=1)
    assert not abilities_of(generator)
    for options in ({"constraint": BY_SCHEMA}, {"top_logprobs": 0}, {"tools": ({"type": "function"},)}):
        with pytest.raises(UsageError, match="plain text"):
            list(generator.stream(GenerationRequest(ASKED, max_tokens=2, **options)))  # type: ignore[arg-type]
    generator.close()


def test_the_likeliest_tokens_best_first() -> None:
    logprobs = np.array([-3.0, -1.0, -2.0, -1.0], np.float32)
    assert top_tokens(logprobs, 3) in ([1, 3, 2], [3, 1, 2])
    assert top_tokens(logprobs, 0) == []
    assert len(top_tokens(logprobs, 9)) == 4
