"""Graphs in fewer bits, against the same sums in plain numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmops.compress.graph_files import trial_rows
from slmops.compress.outliers import NOISE_SHARE, noise_share, products_with_outliers
from slmops.compress.precision import at_precision, symmetric_int8, to_fp16, to_int4, to_int8

VOCABULARY, WIDTH, LABELS = 96, 64, 70
RANDOM = np.random.default_rng(5)
EMBEDDINGS = RANDOM.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
MIX = RANDOM.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8
OUT = RANDOM.normal(size=(WIDTH, LABELS)).astype(np.float32) / 8


def small_graph(embeddings: np.ndarray = EMBEDDINGS) -> onnx.ModelProto:
    """``relu(embeddings[ids] @ MIX) @ OUT``, summed over the tokens that the mask keeps."""
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["read"], name="read"),
        helper.make_node("MatMul", ["read", "mix"], ["mixed"], name="mix"),
        helper.make_node("Relu", ["mixed"], ["active"], name="active"),
        helper.make_node("MatMul", ["active", "out"], ["each"], name="out"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"], name="widen"),
        helper.make_node("Mul", ["each", "mask3"], ["kept"], name="keep"),
        helper.make_node("ReduceSum", ["kept", "second"], ["logits"], keepdims=0, name="sum"),
    ]
    constants = {"embeddings": embeddings, "mix": MIX, "out": OUT, "last": np.array([-1]), "second": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", LABELS])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    return logits


def plain(ids: np.ndarray, embeddings: np.ndarray, mix: np.ndarray, out: np.ndarray) -> np.ndarray:
    each = np.maximum(embeddings[ids].astype(np.float64) @ mix, 0) @ out
    summed: np.ndarray = each.sum(axis=1)
    return summed


def quantize_8(values: np.ndarray) -> np.ndarray:
    """The kernel's own rounding of activations: 8 bits without sign, one scale and zero point for all."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step


IDS = RANDOM.integers(0, VOCABULARY, (3, 11))


def test_int8_is_the_plain_sum_of_rounded_weights_and_activations() -> None:
    (mix, mix_scale), (out, out_scale) = symmetric_int8(MIX, axis=0), symmetric_int8(OUT, axis=0)
    rows, row_scale = symmetric_int8(EMBEDDINGS, axis=1)
    states = quantize_8((rows * row_scale)[IDS]) @ (mix * mix_scale)
    expected = (quantize_8(np.maximum(states, 0)) @ (out * out_scale)).sum(axis=1)
    np.testing.assert_allclose(run(to_int8(small_graph()), IDS), expected, atol=0.02)
    exact = plain(IDS, EMBEDDINGS, MIX, OUT)
    assert 0.02 < np.abs(expected - exact).max() < 0.5


def test_fp16_is_the_plain_sum_of_weights_in_half_precision() -> None:
    half = [weight.astype(np.float16).astype(np.float64) for weight in (EMBEDDINGS, MIX, OUT)]
    np.testing.assert_allclose(run(to_fp16(small_graph()), IDS), plain(IDS, *half), atol=1e-4)


def test_int4_errs_by_less_than_a_step_of_each_block() -> None:
    given, exact = run(to_int4(small_graph()), IDS), plain(IDS, EMBEDDINGS, MIX, OUT)
    assert np.corrcoef(given.ravel(), exact.ravel())[0, 1] > 0.95
    assert np.abs(given - exact).max() > 0.1  # it is 4 bits indeed


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_graph_that_was_given_stays_as_it_was(precision: str) -> None:
    model = small_graph()
    before = model.SerializeToString()
    at_precision(model, precision, frozenset({"mix"}))  # type: ignore[arg-type]
    assert model.SerializeToString() == before


def test_a_scale_for_each_channel_and_none_is_zero() -> None:
    weight = np.array([[1.0, 0.0, -300.0], [-2.0, 0.0, 0.1]], dtype=np.float32)
    values, scales = symmetric_int8(weight, axis=0)
    np.testing.assert_allclose(scales, [2 / 127, 1, 300 / 127])
    assert values.tolist() == [[64, 0, -127], [-127, 0, 0]]
    values, scales = symmetric_int8(weight, axis=1)
    assert scales.shape == (2, 1)
    np.testing.assert_allclose(values * scales, weight, atol=300 / 127 / 2)


# --- outliers


def with_one_loud_token() -> onnx.ModelProto:
    """One token of the trial's is 1,000 times louder than the rest, after the first product too."""
    embeddings = EMBEDDINGS.copy()
    ids, _ = trial_rows(VOCABULARY, 48)
    embeddings[ids[-1, 0]] *= 1000
    return small_graph(embeddings)


def test_loud_tokens_are_found_where_they_are() -> None:
    assert products_with_outliers(small_graph(), VOCABULARY, 48) == frozenset()
    assert products_with_outliers(with_one_loud_token(), VOCABULARY, 48) == {"mix", "out"}


def test_weight_only_products_keep_the_quiet_tokens() -> None:
    model = with_one_loud_token()
    ids, _ = trial_rows(VOCABULARY, 48)
    loud, quiet = ids[-1, 0], np.array([[i for i in range(VOCABULARY) if i != ids[-1, 0]]])
    together = np.concatenate([np.full_like(quiet, loud), quiet])  # a row of the loud token beside one of the others
    exact = run(model, together)[1]
    dynamic, chosen = (run(to_int8(model, names), together)[1] for names in (frozenset(), frozenset({"mix", "out"})))
    assert np.abs(chosen - exact).max() < 0.1 * np.abs(dynamic - exact).max()


def test_only_the_named_products_are_weight_only() -> None:
    nodes = {node.output[0]: node.op_type for node in to_int8(small_graph(), frozenset({"out"})).graph.node}
    assert nodes["mixed"] == "DynamicQuantizeMatMul"
    assert nodes["each"] == "MatMulNBits"


def test_noise_share_is_that_of_uniform_rounding() -> None:
    values = RANDOM.uniform(-1, 1, (40, 500)).astype(np.float32)
    rounded = quantize_8(values.astype(np.float64))
    measured = np.square(rounded - values).mean() / np.square(values).mean()
    assert noise_share(values) == pytest.approx(measured, rel=0.1)
    assert noise_share(values) < NOISE_SHARE
    assert noise_share(np.zeros((2, 3), dtype=np.float32)) == 0
    assert noise_share(np.array([[0.0], [0.0], [5.0]], dtype=np.float32)) == 1
