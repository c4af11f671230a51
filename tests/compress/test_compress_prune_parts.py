"""What is measured of a model's parts, against slow references; which sizes are legal; which weights become zero."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.tiny_models import write_tiny_model
from slmops.artifacts import Message, Row
from slmops.compress.prune.calibration import CalibrationBatch, calibration_batches, first_tokens
from slmops.compress.prune.depth import all_but_every_kth, by_divergence, by_influence, least
from slmops.compress.prune.plan import Plan, plan_by_shares, plans_by_parameters
from slmops.compress.prune.sparsity import lowest, sparsegpt, sparsify, wanda
from slmops.compress.prune.stream import Stream, divergence, inputs_of
from slmops.compress.prune.subject import Subject
from slmops.compress.prune.width import (
    best_heads,
    channel_importance,
    head_importance,
    hidden_importance,
    legal_heads,
    measure_activity,
    rescaled_norms,
    rounded,
)
from slmops.errors import DataError, ModelError, UsageError
from slmops.models.cut import Cut, Sizes
from slmops.recipe import PruneConfig, SparsityConfig

FAMILIES = ("llama", "phi3", "gemma3")
TEXTS = [("my card is lost", "refund"), ("hello world how are you", "today"), ("where is my top up", "tell me now")]
ROWS = [Row(str(n), (Message("user", f"{text} {n}"),), target) for n, (text, target) in enumerate(TEXTS * 4)]


def shown(row: Row) -> tuple[Message, ...]:
    return row.messages


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_tiny_model(folder / family, family, layers=5)
    return {family: folder / family for family in FAMILIES}


def batches_of(folder: Path, count: int = 8) -> list[CalibrationBatch]:
    return calibration_batches(folder, ROWS, shown, count=count, max_tokens=64, seed=0)


def said(model: Any, batches: Sequence[CalibrationBatch]) -> torch.Tensor:
    """Log-probabilities at the tokens that count, by the model's own forward."""
    found = []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found.append(logits[batch.predicts].log_softmax(dim=-1))
    return torch.cat(found)


# --- calibration ------------------------------------------------------------------------------------------------


def test_what_counts_is_what_stands_before_the_answers_tokens(folders: dict[str, Path]) -> None:
    from slmops.chat import ChatTokenizer

    chat = ChatTokenizer.load(folders["llama"])
    batches = batches_of(folders["llama"])
    texts = set()
    for batch in batches:
        for ids, mask, wanted in zip(batch.input_ids, batch.attention_mask, batch.predicts, strict=True):
            assert not (wanted & ~mask.bool()).any()
            texts.add(chat.decode(ids[1:][wanted[:-1]].tolist()).strip())
    assert texts <= {answer for _, answer in TEXTS} | {""}
    assert len(texts) == 3


def test_the_seed_decides_which_rows(folders: dict[str, Path]) -> None:
    def ids(seed: int) -> list[list[int]]:
        found = calibration_batches(folders["llama"], ROWS, shown, count=4, max_tokens=64, seed=seed)
        return [row for batch in found for row in batch.input_ids.tolist()]

    assert ids(1) == ids(1) != ids(2)
    assert len(ids(1)) == 4


def test_rows_without_use_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="no rows to calibrate on"):
        calibration_batches(folders["llama"], [], shown, count=4, max_tokens=64, seed=0)
    with pytest.raises(DataError, match="None of the 12 rows"):
        calibration_batches(folders["llama"], ROWS, shown, count=40, max_tokens=3, seed=0)


def test_few_tokens_are_whole_batches(folders: dict[str, Path]) -> None:
    batches = batches_of(folders["llama"])
    assert first_tokens(batches, 1) == batches[:1]
    assert first_tokens(batches, 10**9) == batches


# --- layer by layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_says_what_the_model_says(folders: dict[str, Path], family: str) -> None:
    subject = Subject.load(folders[family])
    batches = batches_of(folders[family])
    torch.testing.assert_close(torch.cat(Stream(subject, batches).answers()), said(subject.model, batches))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_go_by_divergence_as_in_a_slow_search(folders: dict[str, Path], family: str) -> None:
    """Every removal really made, every forward the model's own."""
    subject = Subject.load(folders[family])
    batches = batches_of(folders[family], count=3)
    whole = said(subject.model, batches)
    left, expected, moved = list(range(5)), [], []
    for _ in range(3):
        costs = {}
        for layer in left:
            stay = tuple(one for one in left if one != layer)
            after = said(subject.cut(Cut(layers=stay)).model, batches)
            costs[layer] = float((whole.exp() * (whole - after)).sum(dim=-1).mean())
        expected.append(min(left, key=costs.__getitem__))
        moved.append(costs[expected[-1]])
        left.remove(expected[-1])
    gone, found = by_divergence(Stream(subject, batches), 3)
    assert gone == expected
    assert found == pytest.approx(moved, rel=1e-3)


def test_influence_is_one_minus_the_cosine(folders: dict[str, Path]) -> None:
    subject = Subject.load(folders["llama"])
    batches = batches_of(folders["llama"])
    cosines: list[list[np.ndarray]] = [[] for _ in range(5)]
    for batch in batches:
        with torch.no_grad():
            out = subject.body(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
            )
        real = batch.attention_mask.bool()
        # The last of transformers' states is normed; the layer's own comes from a stream.
        states = [state[real].double().numpy() for state in out.hidden_states[:-1]]
        last = Stream(subject, [batch])
        states.append(last.through(last.first, range(5))[0][real].double().numpy())
        for layer, (a, b) in enumerate(itertools.pairwise(states)):
            cosines[layer].append((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
    expected = [1 - np.concatenate(one).mean() for one in cosines]
    found = by_influence(Stream(subject, batches))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert least(found, 2) == list(np.argsort(expected)[:2])


def test_a_layer_that_does_nothing_goes_first(folders: dict[str, Path]) -> None:
    subject = Subject.load(folders["llama"])
    with torch.no_grad():
        for name in ("o_proj", "down_proj"):
            part = subject.part(3, name)
            assert part is not None
            part.weight.mul_(1e-4)
    stream = Stream(subject, batches_of(folders["llama"]))
    gone, moved = by_divergence(stream, 1)
    assert gone == [3] == least(by_influence(stream), 1)
    assert moved[0] < 1e-4


@given(st.integers(1, 30), st.data())
def test_every_kth_leaves_the_ends(layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, layers - 1))
    gone = all_but_every_kth(layers, count)
    assert len(gone) == count
    assert 0 not in gone
    assert layers - count < 2 or layers - 1 not in gone


def test_divergence_is_scipys() -> None:
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(7), size=9) for _ in range(2))
    logs = [[torch.tensor(np.log(x[:4])), torch.tensor(np.log(x[4:]))] for x in (p, q)]
    assert divergence(*logs) == pytest.approx(entropy(p, q, axis=1).mean())
    assert divergence(logs[0], logs[0]) == 0


# --- width ------------------------------------------------------------------------------------------------------


def test_importance_by_a_slow_reference(folders: dict[str, Path]) -> None:
    subject = Subject.load(folders["llama"])
    batches = batches_of(folders["llama"])
    activity = measure_activity(subject, batches)
    subject.model.requires_grad_(False)
    layer: Any = subject.layers[2]
    inner, attended, normed = [], [], []
    for batch in batches:
        stream = Stream(subject, [batch])
        (state,) = stream.through(stream.first, [0, 1])
        seen: list[torch.Tensor] = []
        with inputs_of([layer.self_attn.o_proj, layer.mlp.down_proj], seen):
            stream.step([state], 2)
        real = batch.attention_mask.bool()
        attended.append(seen[0][real])
        inner.append(seen[1][real])
        with torch.no_grad():
            normed.append(layer.input_layernorm(state)[real])
    channels, heads, hidden = (torch.cat(one).detach() for one in (inner, attended, normed))
    for channel in (0, 17, 127):
        expected = channels[:, channel].square().mean().sqrt() * layer.mlp.down_proj.weight[:, channel].norm()
        assert float(channel_importance(subject, activity)[2][channel]) == pytest.approx(float(expected), rel=1e-4)
    weight = layer.self_attn.o_proj.weight
    expected = sum(heads[:, 16 + d].square().mean() * weight[:, 16 + d].square().sum() for d in range(16)) ** 0.5
    assert float(head_importance(subject, activity)[2][1]) == pytest.approx(float(expected), rel=1e-4)
    found = activity.norms_out["layers.2.input_layernorm"]
    torch.testing.assert_close(found, hidden.square().mean(dim=0), rtol=1e-4, atol=1e-6)
    assert hidden_importance(activity).shape == (64,)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_corrected_for_the_dimensions_that_went(folders: dict[str, Path], family: str) -> None:
    """Dimensions that carry nothing go: without the correction every norm would be off by the same factor, and with it
    the model says the same."""
    subject = Subject.load(folders[family])
    kept = tuple(range(48))
    with torch.no_grad():
        subject.body.embed_tokens.weight[:, 48:] = 0
        for layer in range(5):
            for name in ("o_proj", "down_proj"):
                part = subject.part(layer, name)
                assert part is not None
                part.weight[48:] = 0
    batches = batches_of(folders[family])
    activity = measure_activity(subject, batches)
    cut = Cut(hidden=kept)
    smaller = subject.cut(cut)
    without = divergence([said(subject.model, batches)], [said(smaller.model, batches)])
    weights = rescaled_norms(smaller.model.state_dict(), "model.", cut, activity, subject.config["model_type"])
    smaller.model.load_state_dict(weights)
    with_correction = divergence([said(subject.model, batches)], [said(smaller.model, batches)])
    assert with_correction < 1e-6
    assert without > 100 * with_correction


HEADS = st.integers(1, 8).flatmap(lambda groups: st.integers(1, 8).map(lambda each: (groups * each, groups)))


@given(HEADS, st.floats(0, 0.99))
def test_heads_stay_legal(counts: tuple[int, int], share: float) -> None:
    heads, groups = counts
    sizes = Sizes(2, 64, heads, groups, 16, 128, 300)
    kept, queries = legal_heads(sizes, share, hidden_stays=False)
    assert 1 <= kept <= groups
    assert 1 <= queries <= heads // groups
    exact = (1 - share) * heads
    # No other legal choice is nearer.
    others = [g * q for g in range(1, groups + 1) for q in range(1, heads // groups + 1)]
    assert abs(kept * queries - exact) == min(abs(other - exact) for other in others)
    if share == 0:
        assert (kept, queries) == (groups, heads // groups)
    divides = Sizes(2, 5 * heads, heads, groups, 16, 128, 300)
    kept, queries = legal_heads(divides, share)
    assert divides.hidden % (kept * queries) == 0
    smaller = rounded(divides.hidden, 0.4, of=kept * queries)
    assert 0 < smaller <= divides.hidden
    assert smaller % (kept * queries) == 0


def test_an_odd_number_of_heads_becomes_a_legal_one() -> None:
    sizes = Sizes(30, 576, 9, 3, 64, 1536, 49152)  # SmolLM2-135M
    assert legal_heads(sizes, 0.5) == (2, 2)
    assert legal_heads(sizes, 1 / 3) == (3, 2)
    assert legal_heads(sizes, 2 / 3) == (3, 1)
    plan = plan_by_shares(sizes, PruneConfig(depth=0.5, heads=0.5, channels=0.5, hidden=0.5))
    assert plan == Plan(15, 2, 2, 768, 288)
    assert plan_by_shares(sizes, PruneConfig(hidden=0.1)).hidden == 504  # a multiple of nine


@given(HEADS, st.data())
@settings(max_examples=50)
def test_the_best_heads_are_chosen_group_by_group(counts: tuple[int, int], data: st.DataObject) -> None:
    heads, groups = counts
    sizes = Sizes(2, 64, heads, groups, 16, 128, 300)
    kept = data.draw(st.integers(1, groups))
    queries = data.draw(st.integers(1, heads // groups))
    values = data.draw(st.permutations(list(range(1, heads + 1))))
    found = best_heads(torch.tensor(values, dtype=torch.float32), sizes, kept, queries)
    each = heads // groups
    by_group = [sorted(values[g * each : (g + 1) * each], reverse=True)[:queries] for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -sum(v * v for v in by_group[g]))[:kept]
    assert sorted(values[head] for head in found) == sorted(v for g in best for v in by_group[g])
    assert list(found) == sorted(found)
    assert Cut(heads=(found,)).sizes(sizes).groups == kept


@given(st.integers(1, 20000), st.floats(0, 0.99))
def test_sizes_are_rounded_within_a_sixteenth(size: int, share: float) -> None:
    left = rounded(size, share)
    assert 1 <= left <= size
    assert abs(left - (1 - share) * size) <= max(1, size / 16) + 1e-9 or left < max(1, size / 8)
    if size >= 256 and share:
        assert left % 32 == 0 or left == size


SMOL = Sizes(30, 576, 9, 3, 64, 1536, 3000)


@pytest.mark.parametrize("by", ["depth", "width", "both"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_plans_leave_the_share_asked_for(share: float, by: str) -> None:
    plans = plans_by_parameters(SMOL, share, by, tied=True)
    total = SMOL.parameters(tied=True)
    for plan in plans:
        left = plan.sizes(SMOL).parameters(tied=True) / total
        assert left == pytest.approx(1 - share, abs=0.02)
        if by == "depth":
            assert plan == Plan(plan.layers, 3, 3, 1536, 576)
        if by == "width":
            assert plan.layers == 30
        assert plan.hidden % (plan.groups * plan.queries) == 0  # Llama's configuration takes no other
    assert len(set(plans)) == len(plans)
    assert by == "depth" or len(plans) > 2


def test_more_than_the_layers_is_refused() -> None:
    large_vocabulary = Sizes(2, 64, 4, 2, 16, 128, 50_000)
    with pytest.raises(UsageError, match="cannot be removed by depth: the embeddings alone are 98%"):
        plans_by_parameters(large_vocabulary, 0.5, "depth", tied=True)
    with pytest.raises(UsageError, match="leaves none of the 2 layers"):
        plan_by_shares(large_vocabulary, PruneConfig(depth=0.9))


# --- zeros ------------------------------------------------------------------------------------------------------


def random_matrix(outputs: int = 12, inputs: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that go together in part."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.linspace(0.1, 2, inputs)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(500, inputs, generator=generator) @ mixing


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_wanda_by_hand(share: float) -> None:
    weight, inputs = random_matrix()
    norms = inputs.norm(dim=0)
    found = wanda(weight, norms, share, "free")
    for row in range(len(weight)):
        order = sorted(range(40), key=lambda i: abs(float(weight[row, i])) * float(norms[i]))
        gone = set(order[: int(share * 40)])
        for i in range(40):
            assert float(found[row, i]) == (0 if i in gone else float(weight[row, i]))


def test_two_of_four_by_hand() -> None:
    weight, inputs = random_matrix()
    norms = inputs.norm(dim=0)
    found = wanda(weight, norms, 0.5, "2:4")
    for row in range(len(weight)):
        for start in range(0, 40, 4):
            order = sorted(range(start, start + 4), key=lambda i: abs(float(weight[row, i])) * float(norms[i]))
            assert [float(found[row, i]) == 0 for i in order] == [True, True, False, False]


def slow_sparsegpt(weight: np.ndarray, squares: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Optimal brain surgeon, column by column from the left, the inverse of what is left computed anew each time."""
    weight = weight.copy()
    count = weight.shape[1]
    squares = squares + 0.01 * np.diag(squares).mean() * np.eye(count)
    for column in range(count):
        inverse = np.linalg.inv(squares[column:, column:])
        for row in range(len(weight)):
            if gone[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


@pytest.mark.parametrize("pattern", ["free", "2:4"])
@pytest.mark.parametrize("block", [8, 16, 128])
def test_sparsegpt_is_the_surgeon_column_by_column(pattern: str, block: int) -> None:
    weight, inputs = random_matrix()
    squares = inputs.T @ inputs
    found = sparsegpt(weight, squares, 0.5, pattern, block=block)
    gone = (found == 0).numpy()
    expected = slow_sparsegpt(weight.double().numpy(), squares.double().numpy(), gone)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert gone.mean() == pytest.approx(0.5, abs=0.03)
    if pattern == "2:4":
        assert (gone.reshape(12, 10, 4).sum(axis=-1) == 2).all()


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_each_method_keeps_more_of_the_output_than_the_simpler(pattern: str) -> None:
    def error(found: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor) -> float:
        return float(((found - weight) @ inputs.T).square().mean())

    lost = {"magnitude": 0.0, "wanda": 0.0, "sparsegpt": 0.0}
    for seed in range(5):
        weight, inputs = random_matrix(seed=seed)
        squares = inputs.T @ inputs
        lost["magnitude"] += error(wanda(weight, torch.ones(40), 0.5, pattern), weight, inputs)
        lost["wanda"] += error(wanda(weight, inputs.norm(dim=0), 0.5, pattern), weight, inputs)
        lost["sparsegpt"] += error(sparsegpt(weight, squares, 0.5, pattern), weight, inputs)
    assert lost["sparsegpt"] < 0.9 * lost["wanda"]
    assert lost["wanda"] < lost["magnitude"]


def test_inputs_that_are_never_there_cost_nothing() -> None:
    weight, inputs = random_matrix()
    inputs[:, ::2] = 0
    found = sparsegpt(weight, inputs.T @ inputs, 0.5, "free")
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found @ inputs.T, weight @ inputs.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_whole_model_gets_its_zeros(folders: dict[str, Path], family: str, method: Any) -> None:
    subject = Subject.load(folders[family])
    before = {name: weight.clone() for name, weight in subject.model.state_dict().items()}
    share = sparsify(subject, batches_of(folders[family]), SparsityConfig(method=method, share=0.4))
    assert share == pytest.approx(0.4, abs=0.02)
    for name, weight in subject.model.state_dict().items():
        zeros = float((weight == 0).float().mean())
        assert zeros == pytest.approx(0.4, abs=0.03) if "proj" in name else torch.equal(weight, before[name]), name


def test_two_of_four_needs_fours(folders: dict[str, Path]) -> None:
    subject = Subject.load(folders["llama"]).cut(Cut(channels=(tuple(range(126)),) * 5))
    with pytest.raises(ModelError, match="down_proj of layer 0 has 126 inputs"):
        sparsify(subject, batches_of(folders["llama"]), SparsityConfig(pattern="2:4"))


def test_lowest_breaks_ties_by_place() -> None:
    assert lowest(torch.ones(1, 4), 0.5, "free").tolist() == [[True, True, False, False]]
    assert lowest(torch.ones(1, 4), 0.5, "2:4").tolist() == [[True, True, False, False]]
