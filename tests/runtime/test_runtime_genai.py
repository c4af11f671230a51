"""The generator of a device, against transformers on the same weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.tiny_models import write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message
from slmops.errors import ContextLengthError, CorruptArtifactError, ModelError, ModelNotFoundError
from slmops.runtime.base import Generation, GenerationRequest
from slmops.runtime.device import open_device_model
from slmops.runtime.genai import MAX_BATCH, GenaiGenerator, greedy_batches
from slmops.runtime.sampling import log_likelihood

QUESTIONS = ["hello", "how are you today? my card is lost and I want a refund", "x", "ü€😀", "", "hello"]


def ask(text: str, **options: Any) -> GenerationRequest:
    return GenerationRequest((Message("user", text),), **{"max_tokens": 24, **options})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def llama(checkpoint: Path) -> Any:
    return write_tiny_llama(checkpoint, context_tokens=128)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai") / "model"
    write_tiny_generator(folder, checkpoint)
    return folder


@pytest.fixture(scope="module")
def generator(folder: Path) -> GenaiGenerator:
    return GenaiGenerator.load(folder, threads=1)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path, llama: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def reference_ids(llama: Any, tokenizer: Any, question: str, max_tokens: int = 24) -> tuple[int, list[int]]:
    """Prompt length, and transformers' greedy answer without the token that ends it."""
    import torch

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        whole = llama.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)[0].tolist()
    answer = whole[len(prompt) :]
    return len(prompt), answer[: answer.index(2)] if 2 in answer else answer


def test_greedy_answers_are_those_of_transformers(generator: GenaiGenerator, llama: Any, tokenizer: Any) -> None:
    for question in QUESTIONS:
        prompt_tokens, ids = reference_ids(llama, tokenizer, question)
        (answer,) = generator.generate([ask(question)])
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert (answer.prompt_tokens, answer.completion_tokens) == (prompt_tokens, len(ids))
        assert answer.finish_reason == ("length" if len(ids) == 24 else "stop")


def test_a_batch_of_unlike_lengths_is_answered_as_one_by_one(generator: GenaiGenerator) -> None:
    requests = [ask(question * (1 + number % 3)) for number, question in enumerate(QUESTIONS * 4)]
    requests[3] = ask("hello", max_tokens=3)
    assert len(requests) > 2 * MAX_BATCH
    assert generator.generate(requests) == [generator.generate([request])[0] for request in requests]


def test_an_ending_token_ends_one_row_and_not_its_neighbours(
    folder: Path, generator: GenaiGenerator, llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The fifth token of one answer is made the end of turn: that row stops there, whole characters only."""
    _, ids = reference_ids(llama, tokenizer, "hello")
    ending = next(token for at, token in enumerate(ids) if at >= 4 and token not in ids[:at])
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [2, ending]
    (tmp_path / "model/genai_config.json").write_text(json.dumps(config))
    changed = GenaiGenerator.load(tmp_path / "model", threads=1)
    first, second = changed.generate([ask("hello"), ask("x")])
    assert first.finish_reason == "stop"
    assert first.completion_tokens == ids.index(ending)
    assert first.text == tokenizer.decode(ids[: ids.index(ending)], skip_special_tokens=True)
    (alone,) = changed.generate([ask("x")])
    assert second == alone


def test_the_pieces_of_a_stream_are_the_answer(generator: GenaiGenerator) -> None:
    for question in QUESTIONS:
        (whole,) = generator.generate([ask(question)])
        *pieces, last = generator.stream(ask(question))
        assert all(piece.finish_reason is None for piece in pieces)
        assert "".join(piece.text for piece in [*pieces, last]) == whole.text
        assert (
            Generation(whole.text, last.finish_reason or "length", last.prompt_tokens, last.completion_tokens) == whole
        )


def test_a_closed_stream_leaves_the_model_usable(generator: GenaiGenerator) -> None:
    stream = generator.stream(ask("hello"))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert generator.generate([ask("hello")])[0].completion_tokens == 24


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(generator: GenaiGenerator) -> None:
    (whole,) = generator.generate([ask("hello")])
    stop = whole.text[6:9]
    (cut,) = generator.generate([ask("hello", stop=("never", stop))])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < whole.completion_tokens
    assert "".join(piece.text for piece in generator.stream(ask("hello", stop=(stop,)))) == cut.text


def test_sampling_repeats_with_its_seed_and_varies_without(generator: GenaiGenerator) -> None:
    def sample(seed: int | None) -> str:
        return generator.generate([ask("hello", temperature=1.5, seed=seed)])[0].text

    assert sample(7) == sample(7)
    assert sample(0) == sample(0)
    assert len({sample(seed) for seed in range(5)}) == 5
    assert len({sample(None) for _ in range(5)}) > 1
    assert sample(2**40 + 7)


def test_sampling_follows_the_models_distribution(generator: GenaiGenerator, llama: Any, tokenizer: Any) -> None:
    """First tokens of 600 samples against the softmax: every token within reach, and top_p cuts the tail."""
    import torch

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        exact = torch.softmax(llama(torch.tensor([prompt])).logits[0, -1] / 1.5, -1).numpy()
    counts = np.zeros(len(exact))
    for seed in range(600):
        request = ask("hello", max_tokens=1, temperature=1.5, seed=seed)
        engine, _ = generator._start([prompt], [request])
        engine.generate_next_token()
        counts[engine.get_next_tokens()[0]] += 1
    assert np.abs(counts / 600 - exact).max() < 0.05
    assert (counts > 0).sum() > 50  # the export's own top_k of 50 is off
    nucleus = {
        generator.generate([ask("hello", max_tokens=1, temperature=1.5, top_p=1e-6, seed=s)])[0].text for s in range(9)
    }
    assert len(nucleus) == 1


def test_score_is_the_log_likelihood_of_transformers(generator: GenaiGenerator, llama: Any, tokenizer: Any) -> None:
    import torch

    conversation = ((Message("system", "be kind"), Message("user", "where is my card?")), "It is lost. ü")
    messages = [message.to_json() for message in (*conversation[0], Message("assistant", conversation[1]))]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    start = len(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False))
    end = len(ids) - 1 - ids[::-1].index(2) + 1  # the token that ends the turn counts, the line break after it does not
    with torch.no_grad():
        logprobs = torch.log_softmax(llama(torch.tensor([ids])).logits[0].double(), -1)
    expected = sum(float(logprobs[at - 1, ids[at]]) for at in range(start, end))
    (score,) = generator.score([conversation])
    assert score.logprob == pytest.approx(expected, abs=1e-3)
    assert (score.tokens, score.bytes) == (end - start, len("It is lost. ü".encode()))


def test_log_likelihood_by_hand() -> None:
    logits = np.array([[0, 0], [1000, 0]], dtype=np.float16)
    assert log_likelihood(logits, np.array([1, 0])) == pytest.approx(-np.log(2))


def test_int4_answers_and_scores(checkpoint: Path, llama: Any, tmp_path: Path) -> None:
    write_tiny_generator(tmp_path / "model", checkpoint, precision="int4")
    generator = open_device_model(tmp_path / "model", threads=1)
    assert isinstance(generator, GenaiGenerator)
    (answer,) = generator.generate([ask("hello")])
    assert 0 < answer.completion_tokens <= 24
    assert generator.score([((Message("user", "hello"),), "you")])[0].logprob < 0


def test_an_answer_is_cut_at_the_context_and_a_long_prompt_is_refused(generator: GenaiGenerator) -> None:
    used = generator.count_tokens((Message("user", "x" * 60),))
    (answer,) = generator.generate([ask("x" * 60, max_tokens=1000)])
    assert answer.completion_tokens <= generator.context_tokens - used
    assert answer.prompt_tokens == used
    long = ask("x" * 200)
    with pytest.raises(ContextLengthError, match="holds 128 tokens"):
        generator.generate([ask("hello"), long])
    with pytest.raises(ContextLengthError):
        generator.stream(long)
    with pytest.raises(ContextLengthError):
        generator.score([(long.messages, "x")])


def test_batches_never_cut_an_answer_for_a_neighbours_sake() -> None:
    assert greedy_batches({}, 100) == []
    assert greedy_batches({0: (10, 50), 1: (60, 10), 2: (20, 20), 5: (99, 50)}, 100) == [[0, 2], [1], [5]]
    assert [len(batch) for batch in greedy_batches(dict.fromkeys(range(2 * MAX_BATCH + 1), (5, 5)), 100)] == [
        MAX_BATCH,
        MAX_BATCH,
        1,
    ]


def test_the_cache_is_sized_to_the_request(generator: GenaiGenerator) -> None:
    prompt = generator.encode_text("hello")
    engine = generator._generator(len(prompt) + 5, 1, ask("hello"))
    engine.append_tokens(np.array(prompt, dtype=np.int32))
    assert engine.get_output("present.0.key").shape[2] == len(prompt) + 5


def test_a_graph_with_the_last_logits_alone_says_so(checkpoint: Path, llama: Any, tmp_path: Path) -> None:
    write_tiny_generator(tmp_path / "model", checkpoint, options=["prune_lm_head=true"])
    pruned = GenaiGenerator.load(tmp_path / "model", threads=1)
    assert pruned.generate([ask("hello")])[0].completion_tokens > 0
    with pytest.raises(NotImplementedError, match="1 of"):
        pruned.score([((Message("user", "hello"),), "you")])


def test_telemetry_is_off_and_torch_is_absent(folder: Path) -> None:
    code = (
        "import os, sys; from slmops.runtime.genai import GenaiGenerator\n"
        "import onnxruntime_genai as og; calls = []; real = og.disable_telemetry_events\n"
        "og.disable_telemetry_events = lambda: (calls.append(1), real())\n"
        f"GenaiGenerator.load({str(folder)!r}, threads=1)\n"
        "print(len(calls), os.environ['ORT_DISABLE_TELEMETRY'], sorted({n.partition('.')[0] for n in sys.modules} & "
        "{'torch', 'transformers', 'fastapi', 'sqlalchemy'}))"
    )
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == "1 1 []"


def test_bad_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        GenaiGenerator.load(tmp_path)
    for name, damage, said in [
        ("genai_config.json", b"{", "damaged"),
        ("genai_config.json", b"{}", "context_length"),
        ("genai_config.json", None, "is missing"),
        ("model.onnx", b"junk", "cannot be loaded"),
        ("model.onnx", None, "cannot be loaded"),
    ]:
        copy = tmp_path / f"{name} {damage!r}"
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        if damage is not None:
            (copy / name).write_bytes(damage)
        with pytest.raises(CorruptArtifactError, match=said):
            GenaiGenerator.load(copy)
    (tmp_path / "slmops.json").write_text(json.dumps({"runtime": "torch", "form": "generator"}))
    with pytest.raises(ModelError, match="torch"):
        GenaiGenerator.load(tmp_path)
    with pytest.raises(ModelError, match="not an engine of a device"):
        open_device_model(tmp_path)
