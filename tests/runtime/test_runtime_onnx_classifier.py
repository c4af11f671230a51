"""The classifier of a device, against the same sums in plain numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fakes.tiny_models import LABELS, BagOfTokens, tiny_tokenizer, write_tiny_classifier
from slmops.errors import CorruptArtifactError, ModelError, ModelNotFoundError
from slmops.runtime.onnx_classifier import OnnxClassifier, default_threads, encodable, length_batches, pad, softmax

TEXTS = ["my card is lost", "", "where is my refund? " * 40, "ü€😀", "fee", "x\0y", "card " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifier")


@pytest.fixture(scope="module")
def reference(folder: Path) -> BagOfTokens:
    return write_tiny_classifier(folder)


@pytest.fixture(scope="module")
def classifier(folder: Path, reference: BagOfTokens) -> OnnxClassifier:
    return OnnxClassifier.load(folder)


def expected(reference: BagOfTokens, texts: list[str], max_tokens: int = 32) -> np.ndarray:
    tokenizer = tiny_tokenizer()
    return np.stack([reference.probabilities(tokenizer.encode(text).ids[:max_tokens] or [0]) for text in texts])


def test_probabilities_are_those_of_the_plain_sums_in_the_order_given(
    classifier: OnnxClassifier, reference: BagOfTokens
) -> None:
    probabilities = classifier.probabilities(TEXTS)
    assert probabilities.shape == (len(TEXTS), len(LABELS))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(probabilities, expected(reference, TEXTS), atol=1e-5)
    assert classifier.labels == LABELS


def test_one_text_alone_is_answered_as_among_others(classifier: OnnxClassifier) -> None:
    together = classifier.probabilities(TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(classifier.probabilities([text])[0], row, atol=1e-6)


def test_no_texts_give_no_rows(classifier: OnnxClassifier) -> None:
    assert classifier.probabilities([]).shape == (0, len(LABELS))


def test_many_texts_run_in_bounded_batches(classifier: OnnxClassifier, reference: BagOfTokens) -> None:
    texts = [("refund " * (number % 37)).strip() for number in range(700)]
    np.testing.assert_allclose(classifier.probabilities(texts), expected(reference, texts), atol=1e-5)


def test_a_lone_surrogate_is_a_question_mark(classifier: OnnxClassifier) -> None:
    np.testing.assert_array_equal(classifier.probabilities(["a\ud83d"]), classifier.probabilities(["a?"]))


def test_a_text_of_ten_megabytes_costs_what_is_read_of_it(classifier: OnnxClassifier) -> None:
    long = "card " * 2_000_000
    np.testing.assert_array_equal(classifier.probabilities([long]), classifier.probabilities([long[:1000]]))
    assert len(encodable(long, 4096)) == 4096


def test_closed_is_closed(folder: Path, reference: BagOfTokens) -> None:
    classifier = OnnxClassifier.load(folder, threads=2)
    classifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        classifier.probabilities(["x"])


def test_softmax_is_stable_and_exact() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], dtype=np.float32)
    result = softmax(logits)
    np.testing.assert_allclose(result[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0], rtol=1e-6)
    np.testing.assert_allclose(result[1], 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("lengths", [[], [1], [5, 1, 3, 3, 9], [50, 60, 70], [1] * 100])
def test_length_batches_hold_every_row_once_and_keep_the_bound(lengths: list[int]) -> None:
    batches = list(length_batches(lengths, 40))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= 40


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_small_models_take_one_thread() -> None:
    assert default_threads(2_500_000) == 1
    assert default_threads(0) == default_threads(135_000_000) >= 1


def test_neither_torch_nor_transformers_is_imported(folder: Path, reference: BagOfTokens) -> None:
    code = (
        "import sys; from slmops.runtime.onnx_classifier import OnnxClassifier\n"
        f"OnnxClassifier.load({str(folder)!r}).probabilities(['x'])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'fastapi', 'onnxruntime_genai', 'pydantic', 'onnx', 'sqlalchemy'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_folder_without_description_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no slmops\.json"):
        OnnxClassifier.load(tmp_path)
    with pytest.raises(ModelNotFoundError):
        OnnxClassifier.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": "poet"}, "form is 'poet'"),
        ({"labels": []}, "without labels"),
        ({"labels": [1, 2]}, "list of texts"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"labels": ["a", "b"]}, "6 outputs for 2 labels"),
    ],
)
def test_a_description_that_contradicts_itself_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    write_tiny_classifier(tmp_path, **change)
    with pytest.raises(CorruptArtifactError, match=said):
        OnnxClassifier.load(tmp_path)


@pytest.mark.parametrize("raw", ["", "[]", "{", '{"form": "classifier"}', "\ufeff{}"])
def test_a_damaged_description_is_named(tmp_path: Path, raw: str) -> None:
    (tmp_path / "slmops.json").write_text(raw, "utf-8")
    with pytest.raises(CorruptArtifactError, match=r"slmops\.json"):
        OnnxClassifier.load(tmp_path)


def test_a_generator_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slmops.json").write_text(json.dumps({"runtime": "onnx-genai", "form": "generator"}), "utf-8")
    with pytest.raises(ModelError, match="generator for onnx-genai"):
        OnnxClassifier.load(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_missing_or_cut_file_is_named(tmp_path: Path, name: str) -> None:
    write_tiny_classifier(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptArtifactError, match=name):
        OnnxClassifier.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CorruptArtifactError, match=f"{name} is missing"):
        OnnxClassifier.load(tmp_path)


def test_a_graph_of_another_kind_is_named(tmp_path: Path) -> None:
    import onnx

    write_tiny_classifier(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CorruptArtifactError, match="writes"):
        OnnxClassifier.load(tmp_path)
