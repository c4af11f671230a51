"""The linear classifier: what is written is what was fitted, and how sure it is can be believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slmops.errors import CorruptArtifactError
from slmops.models.linear import TEMPERATURES, LinearClassifier, calibrated, fit_linear, text_features

PAIRS = [
    (f"{verb} my {thing} please", label)
    for verb, label in (("lost", "lost"), ("cannot find", "lost"), ("top up", "load"), ("add money to", "load"))
    for thing in ("card", "wallet", "phone", "Ausweis", "κάρτα", "口座")
]


def fitted(pairs: list[tuple[str, str]] = PAIRS) -> LinearClassifier:
    model = fit_linear(pairs, [], seed=0)
    assert model is not None
    return model


def test_it_learns_and_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    model = calibrated(fitted(), PAIRS[::5])
    texts = [text for text, _ in PAIRS] + ["", "LOST!! my\nwallet", "i"]
    model.save(tmp_path)
    again = LinearClassifier.load(tmp_path)
    assert np.array_equal(again.scores(texts), model.scores(texts))
    assert again.temperature == model.temperature != 1
    assert again.labels == ("load", "lost")
    assert model.answers([text for text, _ in PAIRS]) == [label for _, label in PAIRS]
    assert np.allclose(again.probabilities(texts).sum(axis=1), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"linear.json", "linear.safetensors"}


def test_the_temperature_makes_the_right_labels_likeliest() -> None:
    noisy = [(text, label if at % 4 else "lost") for at, (text, label) in enumerate(PAIRS)]
    model = fitted()

    def surprise(one: LinearClassifier) -> float:
        likely = one.probabilities([text for text, _ in noisy])
        right = [one.labels.index(label) for _, label in noisy]
        return float(-np.log(np.maximum(likely[np.arange(len(right)), right], 1e-9)).mean())

    found = calibrated(model, noisy)
    others = [
        LinearClassifier(model.features, model.weights, model.bias, model.labels, temperature)
        for temperature in TEMPERATURES
    ]
    assert surprise(found) == pytest.approx(min(map(surprise, others)))
    assert calibrated(model, []) is model
    assert calibrated(model, [("a", "no such label")]) is model


def test_nothing_to_tell_apart() -> None:
    assert fit_linear([("a", "x"), ("b", "x")], [], 0) is None
    assert fit_linear([("", "x"), (" ", "y")], [], 0) is None
    assert text_features(["", "  "]) is None


@pytest.mark.parametrize("damage", ["linear.json", "linear.safetensors"])
def test_a_damaged_folder(tmp_path: Path, damage: str) -> None:
    fitted().save(tmp_path)
    (tmp_path / damage).write_bytes(b"\x00{")
    with pytest.raises(CorruptArtifactError, match="no linear classifier"):
        LinearClassifier.load(tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(CorruptArtifactError, match="no linear classifier"):
        LinearClassifier.load(tmp_path)
