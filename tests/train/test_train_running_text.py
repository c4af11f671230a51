"""Running text: every token learnt once, by every method; perplexity is the model's own, document by document."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import make_dataset, make_draft

from fakes.tiny_models import write_tiny_llama, write_tiny_model
from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError, GateError, ModelError
from slmops.progress import Progress
from slmops.recipe import TrainConfig
from slmops.train import FinetuneJob, finetune
from slmops.train.generator.answers import EncodedRow
from slmops.train.generator.running_text import cut, encode_documents, join, judged_pieces, learnt_and_judged

SENTENCES = ["my card is lost and I want a refund", "what is the fee of my account", "where is my top up today"]


def text_of(row: Row) -> str:
    return row.text


def documents(folder: Path, copies: int = 6) -> Dataset:
    def rows(count: int, start: int) -> list[Row]:
        made = [
            " ".join(SENTENCES[(n + k) % 3] for k in range(1 + n % 3)) + f" {n}" for n in range(start, start + count)
        ]
        return [Row(str(n), (Message("user", text),)) for n, text in enumerate(made)]

    return make_dataset(folder, {"train": rows(4 * copies, 0), "validation": rows(4, 100), "test": rows(5, 200)})


def job_of(model: Path, dataset: Dataset, draft: Draft, **settings: Any) -> FinetuneJob:
    own = {name: settings.pop(name) for name in ("more_texts", "judged") if name in settings}
    usual = {"precision": "fp32", "batch_size": 4, "epochs": 6, "learning_rate": 5e-3, "max_tokens": 48}
    config = TrainConfig(**{**usual, **settings})
    return FinetuneJob(model, "tiny", "d" * 64, dataset, None, config, 0, draft, to_text=text_of, **own)


def slow_perplexity(folder: Path, texts: list[str], max_tokens: int) -> tuple[float, int]:
    """Each document alone, each of its tokens after at most ``max_tokens`` - 1 others."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = ChatTokenizer.load(folder)
    losses: list[float] = []
    for text in texts:
        ids = [2, *tokenizer.encode(text), 2]
        for at in range(0, len(ids) - 1, max_tokens - 1):
            piece = ids[at : at + max_tokens]
            with torch.no_grad():
                scores = model(torch.tensor([piece])).logits[0].log_softmax(-1)
            losses += [-scores[i - 1, piece[i]].item() for i in range(1, len(piece))]
    return math.exp(sum(losses) / len(losses)), len(losses)


# --- tokens -----------------------------------------------------------------------------------------------------


def test_every_token_is_learnt_once_and_nothing_is_padded(llama: Path) -> None:
    tokenizer = ChatTokenizer.load(llama)
    texts = [SENTENCES[0] * 9, "a", SENTENCES[1], SENTENCES[2] * 3]
    stream = [2, *(token for text in texts for token in [*tokenizer.encode(text), 2])]
    for max_tokens in (2, 3, 16, 47, 4096):
        pieces = learnt_and_judged(tokenizer, texts, texts, max_tokens)["train"]
        assert all(len(piece.tokens) == max_tokens for piece in pieces[:-1])
        learnt = [token for piece in pieces for token, on in zip(piece.tokens, piece.supervised, strict=True) if on]
        assert learnt == stream[1:]
        assert all(piece.supervised == [False] + [True] * (len(piece.tokens) - 1) for piece in pieces)
    alone = judged_pieces(tokenizer, texts, 16)
    assert sum(sum(piece.supervised) for piece in alone) == len(stream) - 1
    assert sum(piece.tokens[-1] == 2 for piece in alone) == len(texts)


def test_a_tokenizer_that_opens_texts_itself(tmp_path: Path) -> None:
    """Llama 2's way: its BOS stands before each document and is not learnt."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    write_tiny_llama(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chat = ChatTokenizer.load(tmp_path)
    first, second = encode_documents(chat, ["hello", "world"])
    whole = join([first, second])
    assert whole.tokens == [1, *chat.encode("hello", add_special_tokens=False), 2, *second.tokens]
    assert [token for token, on in zip(whole.tokens, whole.supervised, strict=True) if not on] == [1, 1]
    assert all(cut(whole, 3)[0].supervised[1:])


def test_a_piece_of_which_nothing_would_be_learnt_is_left_out() -> None:
    assert cut(EncodedRow([1, 5, 1], [False, True, False]), 2) == [EncodedRow([1, 5], [False, True])]


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "bottleneck"])
def test_perplexity_falls_by_every_method_and_is_the_models_own(llama: Path, tmp_path: Path, method: str) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    dataset, draft = documents(tmp_path / "data"), make_draft(tmp_path)
    finetune(job_of(llama, dataset, draft, method=method))
    found = draft.metrics
    assert found["perplexity_after"] < 0.4 * found["perplexity_before"]
    held_out = [row.text for row in dataset.rows("test")]
    assert found["documents_trained"] == 24
    after, tokens = slow_perplexity(draft.path, held_out, 48)
    if method != "bottleneck":  # plain transformers does not read these beside the weights
        assert found["perplexity_after"] == pytest.approx(after, rel=5e-3)
    assert found["tokens_judged"] == tokens
    if method != "qlora":  # judged from the base of 4 bits
        assert found["perplexity_before"] == pytest.approx(slow_perplexity(llama, held_out, 48)[0], rel=1e-3)
    assert (draft.path / "adapter").exists() == (method in {"lora", "qlora"})


@pytest.mark.parametrize("settings", [{"packing": False}, {"accumulation": 3}, {"checkpoint_activations": True}])
def test_packing_and_parts_change_nothing_but_rounding(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    dataset, drafts = documents(tmp_path / "data", 2), [make_draft(tmp_path / name) for name in "ab"]
    for draft, more in zip(drafts, ({}, settings), strict=True):
        finetune(job_of(llama, dataset, draft, method="full", epochs=2, learning_rate=1e-3, **more))
    assert [draft.metrics["packed"] for draft in drafts] == [True, "packing" not in settings]
    a, b = (load_file(draft.path / "model.safetensors") for draft in drafts)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=2e-4, rtol=2e-3)
    assert drafts[0].metrics["perplexity_after"] == pytest.approx(drafts[1].metrics["perplexity_after"], rel=1e-3)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "granite"])
def test_other_families(tmp_path: Path, architecture: str) -> None:
    model, draft = tmp_path / "model", make_draft(tmp_path)
    write_tiny_model(model, architecture)
    dataset = documents(tmp_path / "data", 3)
    finetune(job_of(model, dataset, draft, method="lora", epochs=10))
    assert draft.metrics["perplexity_after"] < 0.6 * draft.metrics["perplexity_before"]
    after, _ = slow_perplexity(draft.path, [row.text for row in dataset.rows("test")], 48)
    assert draft.metrics["perplexity_after"] == pytest.approx(after, rel=5e-3)


def test_more_texts_are_learnt_too_and_another_split_is_judged(llama: Path, tmp_path: Path) -> None:
    dataset, drafts = documents(tmp_path / "data", 1), [make_draft(tmp_path / name) for name in "ab"]
    more = [text_of(row) + "!" for row in dataset.rows("train")] * 4
    for draft, texts in zip(drafts, ([], more), strict=True):
        finetune(job_of(llama, dataset, draft, method="full", epochs=2, more_texts=texts, judged="validation"))
    assert [draft.metrics["documents_trained"] for draft in drafts] == [4, 20]
    assert drafts[1].metrics["perplexity_after"] < drafts[0].metrics["perplexity_after"]
    held_out = [row.text for row in dataset.rows("validation")]
    assert drafts[0].metrics["perplexity_before"] == pytest.approx(slow_perplexity(llama, held_out, 48)[0], rel=1e-3)


class StopError(Exception):
    pass


def test_what_was_stopped_goes_on_to_the_same_weights(llama: Path, tmp_path: Path) -> None:
    dataset = documents(tmp_path / "data", 3)
    drafts = [make_draft(tmp_path / name) for name in "ab"]
    settings = {"method": "lora", "lora": {"dropout": 0.1}, "epochs": 3, "checkpoint_every_steps": 2, "patience": 9}
    finetune(job_of(llama, dataset, drafts[0], **settings))

    def stop(progress: Progress) -> None:
        if progress.done >= 5:
            raise StopError

    with pytest.raises(StopError):
        finetune(job_of(llama, dataset, drafts[1], **settings), progress=stop)
    assert not (drafts[1].path / "model.safetensors").exists()
    steps: list[int] = []
    finetune(job_of(llama, dataset, drafts[1], **settings), progress=lambda event: steps.append(event.done))
    assert steps[0] > 2
    for name in ("history.json", "model.safetensors"):
        assert (drafts[0].path / name).read_bytes() == (drafts[1].path / name).read_bytes(), name
    assert drafts[0].metrics["perplexity_before"] == drafts[1].metrics["perplexity_before"]


def test_the_forgetting_budget_holds(llama: Path, tmp_path: Path) -> None:
    """A base that knows the general text loses it to the field's; an untrained one would have nothing to lose."""
    known = "zq zq xj xj vw vw zq xj"
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": known}) + "\n")
    rows = [Row(str(n), (Message("user", known),)) for n in range(12)]
    taught = make_dataset(tmp_path / "known", {"train": rows[:8], "validation": rows[8:10], "test": rows[10:]})
    base = make_draft(tmp_path / "base")
    finetune(job_of(llama, taught, base, method="full"))
    dataset = documents(tmp_path / "data", 2)
    settings: dict[str, Any] = {"method": "full", "learning_rate": 1e-2}
    forgets = make_draft(tmp_path / "forgets")
    with pytest.raises(GateError, match="The model forgot"):
        finetune(job_of(base.path, dataset, forgets, forgetting={"data": str(general), "budget": 0.02}, **settings))
    assert not (forgets.path / "model.safetensors").exists()
    kept = make_draft(tmp_path / "kept")
    finetune(job_of(base.path, dataset, kept, forgetting={"data": str(general), "budget": 1e9}, **settings))
    found = kept.metrics["forgetting"]
    assert found["loss_after"] > 1.02 * found["loss_before"]


def test_what_cannot_be_learnt_from(llama: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(llama)
    with pytest.raises(DataError, match=r"train\.max_tokens is 1"):
        learnt_and_judged(tokenizer, ["a"], ["b"], 1)
    with pytest.raises(DataError, match="The validation split has no documents"):
        learnt_and_judged(tokenizer, ["a"], [], 8)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="has no end token"):
        encode_documents(ChatTokenizer.load(nothing), ["a"])
