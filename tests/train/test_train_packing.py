"""Packed rows: the same logits, losses and gradients as padded ones, whatever the architecture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fakes.tiny_models import ARCHITECTURES, write_tiny_model
from slmops.train.generator.answers import EncodedRow, collate_rows, supervised_logits
from slmops.train.packing import pack, packed_attention, packing_works, shared_prefix, stop_packing, use_packing


def rows_of(seed: int, *, prefix: int, lengths: list[int], learnt: int = 4) -> list[EncodedRow]:
    rng = random.Random(seed)
    head = [rng.randrange(3, 300) for _ in range(prefix)]
    made = []
    for length in lengths:
        tokens = head + [rng.randrange(3, 300) for _ in range(length)]
        made.append(EncodedRow(tokens, [False] * (len(tokens) - learnt) + [True] * learnt))
    return made


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits, targets = supervised_logits(model, batch)
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_every_gradient_are_those_of_padded_rows(architecture: str, tmp_path: Path) -> None:
    """Also behind a sliding window (Phi-3 and Gemma 3: 16 tokens here) and a shared beginning longer than it."""
    write_tiny_model(tmp_path, architecture)
    rows = rows_of(1, prefix=21, lengths=[9, 30, 17, 9])
    padded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected, wanted = loss_and_gradients(padded, collate_rows(rows))
    use_packing(packed)
    batch = pack([row.tokens for row in rows], [row.supervised for row in rows])
    assert int(batch["prefix"]) == 21
    assert batch["input_ids"].shape == (1, 21 + 9 + 30 + 17 + 9)
    loss, gradients = loss_and_gradients(packed, batch)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=2e-4, rtol=2e-3, msg=name)


def test_recomputed_activations_give_the_same_gradients(llama: Path) -> None:
    rows = rows_of(2, prefix=5, lengths=[6, 12])
    batch = pack([row.tokens for row in rows], [row.supervised for row in rows])
    found = []
    for recompute in (False, True):
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        use_packing(model)
        found.append(loss_and_gradients(model, batch)[1])
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 9))
def test_every_learnt_token_is_predicted_from_the_token_before_it(
    prefix: int, lengths: list[int], learnt: int, seed: int
) -> None:
    rows = rows_of(seed, prefix=prefix, lengths=lengths, learnt=min(learnt, *lengths))
    batch = pack([row.tokens for row in rows], [row.supervised for row in rows])
    shared = int(batch["prefix"])
    tokens = batch["input_ids"][0].tolist()
    pairs = [(row.tokens[i - 1], row.tokens[i]) for row in rows for i in range(1, len(row.tokens)) if row.supervised[i]]
    assert len(tokens) == shared + sum(len(row.tokens) - shared for row in rows)
    found = [(tokens[p], t) for p, t in zip(batch["predict"].tolist(), batch["targets"].tolist(), strict=True)]
    assert found == pairs
    for index, row in enumerate(rows):
        own = batch["gather"][index, : len(row.tokens) - shared].tolist()
        assert [tokens[place] for place in own] == row.tokens[shared:]
        assert [batch["position_ids"][0, place].item() for place in own] == list(range(shared, len(row.tokens)))
    back = batch["gather"].flatten()[batch["scatter"]].tolist()
    assert back == list(range(shared, len(tokens)))


def test_shared_prefix() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 9, 4]], [3, 3]) == 2
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 3]) == 2  # token 2 predicts the first learnt one
    assert shared_prefix([[1, 2, 3]], [2]) == 0
    assert shared_prefix([[1, 2], [1, 2, 3]], [5, 5]) == 2
    assert shared_prefix([[4, 2], [1, 2]], [1, 1]) == 0


def test_packing_is_tried_before_it_is_used(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    rows = [row.tokens for row in rows_of(3, prefix=4, lengths=[5, 8, 3])]
    assert packing_works(model, rows)
    stop_packing(model)
    assert model.config._attn_implementation == "sdpa"
    odd = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    head = odd.model.layers[0].self_attn
    head.forward_before = head.forward
    head.forward = lambda *args, **kwargs: (  # an architecture that looks at its neighbours in the batch
        head.forward_before(*args, **kwargs)[0] + args[0].mean()
        if args
        else head.forward_before(**kwargs)[0] + kwargs["hidden_states"].mean(),
        None,
    )
    assert not packing_works(odd, rows)
    assert odd.config._attn_implementation == "sdpa"


def test_soft_caps_are_refused() -> None:
    one = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="soft cap"):
        packed_attention(None, one, one, one, None, softcap=1.0, packed_gather=one, packed_scatter=one, packed_prefix=0)
