"""Two forms of one model compared: real tiny models in torch and ONNX, and one that was damaged in a known layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fakes.tiny_models import tiny_tokenizer, write_tiny_generator, write_tiny_llama, write_tiny_model
from slmops.artifacts import Message, Row
from slmops.errors import GateError
from slmops.evaluate.drift import LayerDrift, drift_start, layer_drift, layer_states
from slmops.evaluate.gates import Gate
from slmops.evaluate.parity import (
    STEPS,
    LogitParity,
    Parity,
    Step,
    advice,
    check_step,
    compare_answers,
    compare_distributions,
    compare_models,
    compare_tokens,
    divergence,
    drift_gates,
)
from slmops.recipe import DriftConfig, DriftLimits

ROWS = [
    Row(f"r{number}", (Message("user", text),), target)
    for number, (text, target) in enumerate(
        [("my card is lost", "I am sorry"), ("where is my refund", "it is on its way"), ("hello", "hello, how are you")]
    )
]


def to_messages(row: Row) -> tuple[Message, ...]:
    return row.messages


def as_model(folder: Path, runtime: str = "torch") -> None:
    about = {"runtime": runtime, "form": "generator", "precision": "fp32", "labels": None, "max_tokens": 64}
    (folder / "slmops.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in torch, as a graph, at 4 bits; and with layer 1 replaced by noise."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("forms")
    write_tiny_llama(folder / "torch")
    as_model(folder / "torch")
    write_tiny_generator(folder / "fp32", folder / "torch")
    write_tiny_generator(folder / "int4", folder / "torch", precision="int4", options=["block_size=32"])
    shutil.copytree(folder / "torch", folder / "damaged")
    model = AutoModelForCausalLM.from_pretrained(folder / "damaged")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.normal_(std=0.3)
    model.save_pretrained(folder / "damaged")
    write_tiny_generator(folder / "damaged-fp32", folder / "damaged")
    return {name: folder / name for name in ("torch", "fp32", "int4", "damaged", "damaged-fp32")}


def compared(forms: dict[str, Path], before: str, after: str, step: str = "converted") -> Parity:
    found = compare_models(
        (before, forms[before]),
        (after, forms[after]),
        ROWS,
        step=step,
        closed=False,
        to_messages=to_messages,
        threads=1,  # type: ignore[arg-type]
    )
    assert Parity.from_json(json.loads(json.dumps(found.to_json()))) == found
    return found


# --- real models -----------------------------------------------------------------------------------------------------


def test_torch_and_its_graph_are_one_model(forms: dict[str, Path]) -> None:
    found = compared(forms, "torch", "fp32")
    assert found.tokens.share == 1
    assert found.tokens.texts == len(ROWS) + 6
    assert found.engine_tokens is not None
    assert found.engine_tokens.texts == len(ROWS) + 6
    assert found.logits is not None
    assert found.logits.top1_agreement == 1
    assert found.logits.kl_mean < 1e-6
    assert found.logits.positions > 10
    assert found.layers is None
    check_step(found, drift_gates(found, DriftConfig()))


def test_four_bits_move_it_and_the_drift_has_a_layer(forms: dict[str, Path]) -> None:
    found = compared(forms, "fp32", "int4", "quantized")
    assert found.logits is not None
    assert found.logits.kl_mean > 1e-3
    assert found.layers is not None
    assert found.layers.start == 0
    assert len(found.layers.errors) == 2
    assert found.layers.errors[0] > 1e-3
    assert [gate.name for gate in drift_gates(found, DriftConfig())] == ["tokens fp32 → int4"]
    strict = DriftConfig(quantized=DriftLimits(kl=1e-4, top1_agreement=0.0))
    gates = {gate.name: gate for gate in drift_gates(found, strict)}
    assert gates["top-1 fp32 → int4"].passed
    assert not gates["KL fp32 → int4"].passed


@pytest.mark.parametrize(
    ("before", "after"), [("torch", "damaged"), ("torch", "damaged-fp32"), ("fp32", "damaged-fp32")]
)
def test_the_damaged_layer_is_found_and_the_step_is_stopped(forms: dict[str, Path], before: str, after: str) -> None:
    found = compared(forms, before, after)
    assert found.layers is not None
    assert found.layers.start == 1
    assert found.layers.errors[0] < 1e-5
    with pytest.raises(GateError) as error:
        check_step(found, drift_gates(found, DriftConfig()))
    assert f"{before} → {after}" in error.value.message
    assert "starts at layer 1" in error.value.message
    assert "another runtime" in (error.value.remedy or "")


def test_states_of_a_graph_are_those_of_torch(forms: dict[str, Path]) -> None:
    ids = [[1, 5, 9, 30], [40, 41]]
    for a, b in zip(layer_states(forms["torch"], ids), layer_states(forms["fp32"], ids), strict=True):
        assert len(a) == len(b) == 2
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_layers_of_other_families(architecture: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "torch", architecture)
    as_model(tmp_path / "torch")
    write_tiny_generator(tmp_path / "fp32", tmp_path / "torch")
    found = layer_drift(tmp_path / "torch", tmp_path / "fp32", [[1, 5, 9, 30]])
    assert found.why_not or (found.start is None and max(found.errors) < 1e-3)


def test_removed_layers_are_told_or_mapped(forms: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(forms["torch"], tmp_path / "cut")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    model.save_pretrained(tmp_path / "cut")
    ids = [[1, 5, 9]]
    assert layer_drift(forms["torch"], tmp_path / "cut", ids).why_not == "2 layers became 1"
    mapped = layer_drift(forms["torch"], tmp_path / "cut", ids, layer_of={0: 0})
    assert mapped.start is None
    assert mapped.errors[0] < 1e-5


def test_an_engine_without_states_says_so(forms: dict[str, Path], tmp_path: Path) -> None:
    as_model(tmp_path, "somewhere-else")
    found = layer_drift(forms["torch"], tmp_path, [[1, 2]])
    assert found.start is None
    assert "somewhere-else shows no hidden states" in found.sentence


# --- figures -----------------------------------------------------------------------------------------------------


def test_divergence_is_the_formula() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(5, 7)) * 3, random.normal(size=(5, 7)) * 3
    kl, same = divergence(a, b)
    for row in range(5):
        p, q = np.exp(a[row]) / np.exp(a[row]).sum(), np.exp(b[row]) / np.exp(b[row]).sum()
        assert kl[row] == pytest.approx(sum(x * np.log(x / y) for x, y in zip(p, q, strict=True)))
        assert same[row] == (p.argmax() == q.argmax())
    assert divergence(a, a + 5)[0] == pytest.approx(0, abs=1e-12)
    padded = np.hstack([b, np.full((5, 1), -1e9)])
    assert divergence(a, padded)[0] == pytest.approx(kl)


def test_the_worst_row_is_named() -> None:
    flat, sharp = np.zeros((2, 3)), np.array([[9.0, 0, 0], [9.0, 0, 0]])
    found = compare_distributions([("calm", flat, flat), ("wild", flat, sharp)])
    assert found is not None
    assert (found.positions, found.worst_row) == (4, "wild")
    assert found.kl_max > 1
    assert compare_distributions([]) is None


def test_tokens_and_answers_show_their_first_difference() -> None:
    tokenizer = tiny_tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    assert compare_tokens(encode, encode, ["a", "b"]).share == 1
    found = compare_tokens(encode, lambda text: encode(text.replace("é", "e")), ["hello", "café"])
    assert found.share == 0.5
    assert found.first is not None
    assert (found.first["text"], found.first["before"] != found.first["after"]) == ("café", True)
    answers = compare_answers(["yes", "forty-two", "no"], ["yes", "forty-three", "yes"], ["a", "b", "c"])
    assert answers.share == pytest.approx(1 / 3)
    assert answers.first == {"row": "b", "position": 7, "before": "forty-two", "after": "forty-three"}
    assert compare_answers(["a"], ["a"], ["x"]).first is None


def test_where_a_drift_starts() -> None:
    assert drift_start([1e-7, 1e-7, 0.4, 0.5]) == 2
    assert drift_start([0.05, 0.07, 0.1]) == 0
    assert drift_start([1e-6, 1e-5]) is None
    assert drift_start([1e-6, float("nan")]) == 1
    assert drift_start([]) is None


def test_a_tokenizer_of_another_model_is_what_is_named() -> None:
    tokens = compare_tokens(lambda _: [1], lambda _: [2], ["a"])
    parity = Parity("a", "b", "converted", tokens, None)
    gates: list[Gate] = drift_gates(parity, DriftConfig())
    with pytest.raises(GateError, match="at token 0"):
        check_step(parity, gates)
    assert "tokenizer of the checkpoint" in advice(parity)


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_limits_and_advice(step: Step) -> None:
    same = compare_tokens(lambda _: [1], lambda _: [1], ["a"])
    logits = LogitParity(10, kl_mean=2.0, kl_p95=3.0, kl_max=4.0, top1_agreement=0.1)
    parity = Parity("a", "b", step, same, logits, layers=LayerDrift((0.0, 0.5), 1))
    failed = [gate for gate in drift_gates(parity, DriftConfig()) if not gate.passed]
    assert len(failed) == (2 if step in {"converted", "merged"} else 0)
    assert len(advice(parity)) > 40
    assert ("layer 1" in advice(parity)) is (step in {"pruned", "quantized"})
