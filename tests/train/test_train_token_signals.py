"""Open tasks taught by token: what lies on disk, how it reaches the student, every loss in training, exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train_generator import ANSWERS, chat_rows, chats, load, to_messages
from train_helpers import make_draft
from transformers import LlamaConfig, LlamaForCausalLM

from slmops.artifacts import Dataset, Draft
from slmops.artifacts.token_signals import SignalHeader, TokenSignals
from slmops.chat import ChatTokenizer, tokenizer_digest
from slmops.distill import keep_token_signals, plan_token_signals
from slmops.distill import token_signals as stage
from slmops.errors import DataError, ModelError, StorageError, UsageError
from slmops.models.vocabulary import trim_vocabulary
from slmops.progress import Progress
from slmops.recipe import DistillConfig, LossWeights, StudentConfig, TrainConfig
from slmops.runtime.token_teacher import TokenTeacher
from slmops.train import train_generator_student
from slmops.train.generator.answers import encode_rows
from slmops.train.generator.signals import (
    prefixes,
    read_teacher_tokens,
    same_places,
    student_ids,
    to_student,
)
from slmops.train.generator.taught import OnlineTeacher, Taught, TaughtObjective, check_layer_map

TRAIN = TrainConfig(precision="fp32", batch_size=4, epochs=4, learning_rate=5e-3)
TOP_K = 6


def plan_of(llama: Path, dataset: Dataset, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "tokenizer_digest": tokenizer_digest(llama),
        "vocabulary": 300,
        "top_k": TOP_K,
        "temperature": 1.0,
        "max_tokens": 512,
    }
    return plan_token_signals(dataset, ChatTokenizer.load(llama), to_messages, **{**settings, **more})


def keep(llama: Path, dataset: Dataset, folder: Path, **more: Any) -> Path:
    draft = make_draft(folder)
    keep_token_signals(plan_of(llama, dataset, **more), lambda: TokenTeacher(llama), draft)
    return draft.path


def reference(llama: Path, dataset: Dataset, temperature: float = 1.0) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities ``[tokens, 300]`` of all supervised tokens, one row at a time from the whole logits."""
    model, tokenizer, logs, coming = load(llama), ChatTokenizer.load(llama), [], []
    for row in dataset.rows("train"):
        chat = tokenizer.encode_training(row.messages, row.target or "")
        with torch.no_grad():
            logits = model(torch.tensor([chat.input_ids])).logits[0] / temperature
        for at, on in enumerate(chat.loss_mask):
            if on:
                logs.append(logits[at - 1].log_softmax(-1))
                coming.append(chat.input_ids[at])
    return torch.stack(logs), coming


# --- on disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_the_layers_may_multiply_in_bf16(llama: Path, precision: Any) -> None:
    ids, wanted = [[3, 17, 42, 99, 7, 250, 31]], [[1, 3, 6]]
    exact, rounded = TokenTeacher(llama), TokenTeacher(llama, precision=precision)
    (a,), (b,) = (teacher.top(ids, wanted, 300, 1.0) for teacher in (exact, rounded))
    assert rounded.precision in ("fp32", "bf16")
    for one, other in ((a, b), (b, a)):
        assert np.isclose(np.exp(one.logs).sum(-1), 1, atol=1e-5).all()
        logs = np.empty_like(other.logs)
        np.put_along_axis(logs, other.ids, other.logs, -1)
        divergence = (np.exp(one.logs) * (one.logs - np.take_along_axis(logs, one.ids, -1))).sum(-1)
        assert (divergence < 1e-3).all()
    if precision == "bf16":
        assert not np.array_equal(a.logs, b.logs), "nothing was rounded"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_kept_is_the_teachers_distribution(llama: Path, tmp_path: Path, temperature: float) -> None:
    dataset = chats(tmp_path / "data", 1)
    folder = keep(llama, dataset, tmp_path / "signals", temperature=temperature)
    signals = TokenSignals.read(folder, "train")
    logs, coming = reference(llama, dataset, temperature)
    records = signals.records
    assert len(records) == len(coming)
    best = logs.topk(TOP_K, dim=-1)
    np.testing.assert_array_equal(records["ids"], best.indices)
    np.testing.assert_allclose(records["logs"].astype(np.float64), best.values, atol=0.02)
    tail = (1 - best.values.exp().sum(-1)).numpy()
    np.testing.assert_allclose(np.exp(records["tail"].astype(np.float64)), tail, atol=2e-3)
    expected = logs[torch.arange(len(coming)), coming]
    np.testing.assert_allclose(records["next"].astype(np.float64), expected, rtol=2e-3, atol=2e-3)
    total = np.exp(records["logs"].astype(np.float64)).sum(1) + np.exp(records["tail"].astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=5e-3)
    assert sum(len(signals.of_row(row)) for row in range(len(signals.rows))) == len(records)


@pytest.mark.parametrize(("vocabulary", "top_k", "size"), [(49_152, 48, 196), (151_936, 48, 292), (262_144, 49, 298)])
def test_a_token_takes_at_most_300_bytes(vocabulary: int, top_k: int, size: int) -> None:
    header = SignalHeader("d", vocabulary, top_k, 1.0, 512)
    assert header.token_bytes == size <= 300


def test_the_size_is_known_before_and_is_what_is_written(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data", 2)
    plan = plan_of(llama, dataset)
    draft = make_draft(tmp_path / "signals")
    keep_token_signals(plan, lambda: TokenTeacher(llama), draft)
    written = sum((draft.path / f"{name}_train.npy").stat().st_size for name in ("tokens", "rows"))
    assert 0 <= written - plan.size_bytes < 1024  # the headers of two .npy files
    assert draft.metrics["token_signals"]["size_bytes"] == plan.size_bytes
    assert plan.header.token_bytes == 4 * TOP_K + 4


def test_a_full_disk_is_seen_before_the_teacher_is_opened(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda folder: usage)

    def never() -> Any:
        raise AssertionError("the teacher was opened")

    with pytest.raises(StorageError, match=r"need .* MB \(28 bytes a token\)") as caught:
        keep_token_signals(plan_of(llama, chats(tmp_path / "data", 1)), never, make_draft(tmp_path / "signals"))
    assert "distill.top_k" in (caught.value.remedy or "")


def test_a_killed_run_goes_on_and_ends_the_same(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PIECE_ROWS", 3)
    dataset = chats(tmp_path / "data", 3)
    whole = keep(llama, dataset, tmp_path / "whole")
    asked: list[int] = []

    class Counting(TokenTeacher):
        def top(self, sequences: Any, *rest: Any) -> Any:
            asked.append(len(sequences))
            return super().top(sequences, *rest)

    def stop(event: Progress) -> None:
        if event.done == 6:
            raise KeyboardInterrupt

    cut = make_draft(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        keep_token_signals(plan_of(llama, dataset), lambda: Counting(llama), cut, progress=stop)
    keep_token_signals(plan_of(llama, dataset), lambda: Counting(llama), cut)
    assert asked == [3] * 4, "a row was asked twice"
    for name in ("tokens_train.npy", "rows_train.npy", "token_signals.json"):
        assert (cut.path / name).read_bytes() == (whole / name).read_bytes()


def test_pieces_of_other_work_are_not_taken(llama: Path, tmp_path: Path) -> None:
    dataset, draft = chats(tmp_path / "data", 1), make_draft(tmp_path / "x")

    def stop(event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_token_signals(plan_of(llama, dataset, temperature=3.0), lambda: TokenTeacher(llama), draft, progress=stop)
    keep_token_signals(plan_of(llama, dataset), lambda: TokenTeacher(llama), draft)
    clean = keep(llama, dataset, tmp_path / "clean")
    assert (draft.path / "tokens_train.npy").read_bytes() == (clean / "tokens_train.npy").read_bytes()


# --- on the way to the student ----------------------------------------------------------------------------------


def read(folder: Path, llama: Path, dataset: Dataset, **more: Any) -> Any:
    rows = encode_rows(ChatTokenizer.load(llama), list(dataset.rows("train")), to_messages, 512)
    settings: dict[str, Any] = {
        "tokenizer_digest": tokenizer_digest(llama),
        "kept_ids": None,
        "student_vocabulary": 300,
        "temperature": 1.0,
        "max_tokens": 512,
    }
    return read_teacher_tokens(folder, rows, **{**settings, **more})


def test_signals_that_do_not_belong_are_refused(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data", 1)
    folder = keep(llama, dataset, tmp_path / "signals")
    with pytest.raises(DataError, match="belong to another tokenizer") as caught:
        read(folder, llama, dataset, tokenizer_digest="0" * 64)
    assert "uld" in (caught.value.remedy or "")
    with pytest.raises(DataError, match=r"kept with distill\.temperature 1, and the student is to learn with 2"):
        read(folder, llama, dataset, temperature=2.0)
    with pytest.raises(DataError, match=r"kept with train\.max_tokens 512"):
        read(folder, llama, dataset, max_tokens=64)
    with pytest.raises(DataError, match="belong to other rows"):
        read(folder, llama, chats(tmp_path / "more", 2))
    (folder / "tokens_train.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"tokens_train\.npy cannot be read"):
        read(folder, llama, dataset)
    (folder / "tokens_train.npy").unlink()
    with pytest.raises(DataError, match=r"tokens_train\.npy is missing"):
        read(folder, llama, dataset)
    (folder / "token_signals.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        read(folder, llama, dataset)


def test_the_digest_of_a_tokenizer_sees_its_vocabulary_and_not_its_padding(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_digest(other) == tokenizer_digest(llama)
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_digest(other) != tokenizer_digest(llama)


def test_dropped_tokens_go_into_the_tail() -> None:
    lookup = student_ids(6, [5, 0, 3], 3)
    assert lookup is not None
    assert lookup.tolist() == [1, -1, -1, 2, -1, 0]
    logs = torch.log(torch.tensor([[0.5, 0.2, 0.1], [0.4, 0.3, 0.2]]))
    tail = torch.log(torch.tensor([0.2, 0.1]))
    ids, kept, rest = to_student(torch.tensor([[3, 1, 5], [0, 5, 3]]), logs, tail, lookup)
    assert ids.tolist() == [[2, -1, 0], [1, 0, 2]]
    torch.testing.assert_close(rest.exp(), torch.tensor([0.4, 0.1]))
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.5, 0.0, 0.1], [0.4, 0.3, 0.2]]))
    assert student_ids(300, None, 300) is None


def test_the_same_places_of_a_text_cut_otherwise() -> None:
    assert same_places(["", "it", "it is", "it is l"], ["", "it is", "it is l", "it is lost"]).tolist() == [0, -1, 1, 2]


def objective(llama: Path, folder: Path | None, dataset: Dataset, losses: LossWeights, **more: Any) -> Any:
    rows = encode_rows(ChatTokenizer.load(llama), list(dataset.rows("train")), to_messages, 512)
    config = DistillConfig(losses=losses, **more)
    teachers = [] if folder is None else [read(folder, llama, dataset)]
    online = OnlineTeacher(llama, None, attentions=False) if config.online else None
    return TaughtObjective(rows, rows, config, teachers=teachers, online=online)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "uld"])
def test_the_loss_from_disk_is_that_of_the_whole_logits(llama: Path, tmp_path: Path, name: str) -> None:
    dataset = chats(tmp_path / "data", 1)
    folder = keep(llama, dataset, tmp_path / "signals")
    given = objective(llama, folder, dataset, LossWeights(gold=0, **{name: 2.0}))
    torch.manual_seed(1)
    student = LlamaForCausalLM(LlamaConfig.from_pretrained(llama)).eval()
    batch = given.collate(range(len(given.rows)))
    found = given.loss(student, batch).item()
    teacher, _ = reference(llama, dataset)
    with torch.no_grad():
        whole = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    q = whole[:, :-1][batch["supervised"][:, 1:].bool()].softmax(-1).double().numpy()
    best = teacher.topk(TOP_K, dim=-1)
    p = best.values.exp().double().numpy()
    p = np.concatenate([p, 1 - p.sum(1, keepdims=True)], axis=1)
    if name == "uld":
        ours = -np.sort(-q)[:, :TOP_K]
        ours = np.concatenate([ours, 1 - ours.sum(1, keepdims=True)], axis=1)
        expected = np.abs(ours - p).sum(1).mean()
    else:
        ours = np.take_along_axis(q, best.indices.numpy(), axis=1)
        ours = np.concatenate([ours, 1 - ours.sum(1, keepdims=True)], axis=1)
        middle = (ours + p) / 2
        of = {
            "forward_kl": lambda: p * np.log(p / ours),
            "reverse_kl": lambda: ours * np.log(ours / p),
            "jsd": lambda: 0.5 * p * np.log(p / middle) + 0.5 * ours * np.log(ours / middle),
        }
        expected = of[name]().sum(1).mean()
    assert found == pytest.approx(2 * expected, rel=0.02)  # float16 on disk


def test_the_teacher_beside_gives_the_whole_divergence_and_the_buckets(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data", 1)
    folder = keep(llama, dataset, tmp_path / "signals")
    torch.manual_seed(1)
    student = LlamaForCausalLM(LlamaConfig.from_pretrained(llama)).eval()
    losses = LossWeights(gold=0, forward_kl=1)
    cached = objective(llama, folder, dataset, losses)
    whole = objective(llama, None, dataset, losses, top_k=None)
    batch = whole.collate(range(4))
    teacher, _ = reference(llama, dataset)
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ours = logits[:, :-1][batch["supervised"][:, 1:].bool()].log_softmax(-1)
    expected = (teacher.exp() * (teacher - ours)).sum(-1).mean()
    found = whole.loss(student, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    student_logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ours = student_logits[:, :-1][batch["supervised"][:, 1:].bool()].log_softmax(-1)
    slopes = torch.autograd.grad((teacher.exp() * (teacher - ours)).sum(-1).mean(), list(student.parameters()))
    for parameter, slope in zip(student.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, atol=1e-5, rtol=1e-3)
    # The same buckets, once from disk and once from the teacher beside.
    beside = objective(llama, None, dataset, losses, top_k=TOP_K, on_policy_share=1.0)
    assert beside.loss(student, batch).item() == pytest.approx(  # not in training: nothing is written
        cached.loss(student, cached.collate(range(4))).item(), rel=0.02
    )


# --- training ---------------------------------------------------------------------------------------------------


def teach(
    llama: Path, dataset: Dataset, draft: Draft, distill: DistillConfig, *, student: Any = None, **more: Any
) -> None:
    train = more.pop("train", TRAIN)
    model = more.pop("model", llama)
    config = student or StudentConfig(layers=1)
    train_generator_student(dataset, model, to_messages, config, train, 0, draft, distill=distill, **more)


def divergence_from(teacher: Path, folder: Path, dataset: Dataset) -> float:
    """Mean forward KL over the answers' tokens, over the student's vocabulary, renormalized."""
    theirs, ours = load(teacher), load(folder)
    full, own = ChatTokenizer.load(teacher), ChatTokenizer.load(folder)
    kept = [full._tokenizer.token_to_id(own._tokenizer.id_to_token(i)) for i in range(own.vocab_size)]
    values = []
    for row in dataset.rows("train"):
        chat, mine = (one.encode_training(row.messages, row.target or "") for one in (full, own))
        places = [at - 1 for at, on in enumerate(chat.loss_mask) if on]
        with torch.no_grad():
            p = theirs(torch.tensor([chat.input_ids])).logits[0, places][:, kept].log_softmax(-1)
            q = ours(torch.tensor([mine.input_ids])).logits[0, places].log_softmax(-1)
        values += (p.exp() * (p - q)).sum(-1).tolist()
    return sum(values) / len(values)


ALL_CACHED = LossWeights(gold=0.2, forward_kl=1, reverse_kl=0.5, jsd=0.5)


@pytest.mark.parametrize("vocabulary", ["trim", "keep"])
def test_a_student_comes_nearer_to_its_teacher(llama: Path, tmp_path: Path, vocabulary: Any) -> None:
    dataset = chats(tmp_path / "data", 4)
    folder = keep(llama, dataset, tmp_path / "signals", top_k=40)
    student = StudentConfig(layers=1, vocabulary=vocabulary)
    by_text, by_token = make_draft(tmp_path / "text"), make_draft(tmp_path / "token")
    train = TRAIN.model_copy(update={"epochs": 12})
    teach(llama, dataset, by_text, DistillConfig(), student=student, train=train)
    teach(
        llama, dataset, by_token, DistillConfig(losses=LossWeights(gold=0, forward_kl=1)), student=student,
        train=train, signals=[folder],
    )  # fmt: skip
    plain, taught = (divergence_from(llama, draft.path, dataset) for draft in (by_text, by_token))
    assert taught < 0.5 * plain
    assert not [name for name in load_file(by_token.path / "model.safetensors") if "projection" in name]


CASES: dict[str, dict[str, Any]] = {
    "disk": {"losses": ALL_CACHED},
    "inside": {"losses": LossWeights(hidden=1, attention=1, forward_kl=0.5), "layer_map": {0: 1}},
    "beside": {"losses": LossWeights(gold=0.5, jsd=1), "top_k": None},
    "on policy": {"losses": LossWeights(gold=0.5, reverse_kl=1), "on_policy_share": 0.5, "on_policy_tokens": 6},
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_where_it_was_stopped(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    import slmops.train.loop as loop

    dataset, config = chats(tmp_path / "data", 2), DistillConfig(**CASES[case])
    signals = [keep(llama, dataset, tmp_path / "signals")] if config.cached else []
    more: dict[str, Any] = {"teacher_folder": llama, "signals": signals}
    whole, cut = make_draft(tmp_path / "whole"), make_draft(tmp_path / "cut")
    teach(llama, dataset, whole, config, **more)
    on_step_end = loop._Watch.on_step_end

    def saving(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        control.should_save = True

    monkeypatch.setattr(loop._Watch, "on_step_end", saving)

    def stop(event: Progress) -> None:
        if event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(llama, dataset, cut, config, progress=stop, **more)
    teach(llama, dataset, cut, config, **more)
    for name in ("model.safetensors", "history.json"):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_hidden_states_are_matched_by_a_projection_that_stays_behind(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data", 2)
    rows = encode_rows(ChatTokenizer.load(llama), list(dataset.rows("train")), to_messages, 512)
    config = DistillConfig(losses=LossWeights(gold=0, hidden=1))
    online, student = OnlineTeacher(llama, None, attentions=False), load(llama)
    model = Taught(student, {1: 0}, online.hidden_size)
    given = TaughtObjective(rows, rows, config, online=online, layer_map={1: 0})
    batch = given.collate([0, 1])
    found = given.loss(model, batch)
    with torch.no_grad():
        seen = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        ours = student.model(**seen, output_hidden_states=True).hidden_states[2]
        theirs = online.model.model(**seen, output_hidden_states=True).hidden_states[1]
    total, count = 0.0, 0
    for row in range(2):
        for token in range(int(batch["attention_mask"][row].sum())):
            target = theirs[row, token].double().numpy()
            target = (target - target.mean()) / np.sqrt(target.var() + 1e-5)
            with torch.no_grad():
                mine = model.projections["1"](ours[row, token]).double().numpy()
            total, count = total + ((mine - target) ** 2).sum(), count + len(target)
    assert found.item() == pytest.approx(total / count, rel=1e-4)
    found.backward()
    assert model.projections["1"].weight.grad is not None
    assert all(parameter.grad is None for parameter in online.model.parameters())


def test_a_teacher_of_another_tokenizer(llama: Path, tmp_path: Path) -> None:
    """A student with fewer merges hears the teacher where both cut the text; its distance from it shrinks."""
    dataset = chats(tmp_path / "data", 3)
    folder = keep(llama, dataset, tmp_path / "signals", top_k=40)
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    trimmed = trim_vocabulary(ChatTokenizer.load(llama)._tokenizer, ["my card"])
    trimmed.tokenizer.save(str(other / "tokenizer.json"))
    student = StudentConfig(model="x")
    drafts = [make_draft(tmp_path / name) for name in ("gold", "uld")]
    teach(llama, dataset, drafts[0], DistillConfig(), student=student, model=other)
    config = DistillConfig(losses=LossWeights(gold=0.5, uld=2.0))
    more: dict[str, Any] = {"teacher_folder": llama, "signals": [folder]}
    teach(llama, dataset, drafts[1], config, student=student, model=other, **more)
    weights = [load_file(draft.path / "model.safetensors") for draft in drafts]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ours, theirs = (
        prefixes(tokenizer, chat.input_ids, chat.loss_mask)
        for tokenizer in (ChatTokenizer.load(other), ChatTokenizer.load(llama))
        for chat in [tokenizer.encode_training(chat_rows(1)[0].messages, ANSWERS["where is my card"])]
    )
    places = same_places(ours, theirs)
    assert 0 < (places >= 0).sum() < len(ours)
    config = DistillConfig(losses=LossWeights(forward_kl=1))
    with pytest.raises(DataError, match="belong to another tokenizer"):
        teach(llama, dataset, make_draft(tmp_path / "x"), config, student=student, model=other, **more)
    config = DistillConfig(losses=LossWeights(forward_kl=1), top_k=None)
    with pytest.raises(ModelError, match="reads other tokens"):
        teach(llama, dataset, make_draft(tmp_path / "y"), config, student=student, model=other, teacher_folder=llama)


def test_several_teachers_are_weighed_token_by_token(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data", 1)
    folder = keep(llama, dataset, tmp_path / "one")
    rows = encode_rows(ChatTokenizer.load(llama), list(dataset.rows("train")), to_messages, 512)
    student = load(llama)
    losses = LossWeights(gold=0, forward_kl=1)
    twice = [read(folder, llama, dataset) for _ in range(2)]
    both = TaughtObjective(rows, rows, DistillConfig(losses=losses), teachers=twice)
    one = TaughtObjective(rows, rows, DistillConfig(losses=losses), teachers=twice[:1])
    torch.manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    assert both.loss(student, both.collate([0, 1])).item() == pytest.approx(
        one.loss(student, one.collate([0, 1])).item(), rel=1e-5
    )
    batch = both.collate([0, 1])
    batch["teacher1_next"] = batch["teacher1_next"] - 50  # the second is sure of something else: it is not heard
    batch["teacher1_logs"] = batch["teacher1_logs"].flip(1)
    assert both.loss(student, batch).item() == pytest.approx(one.loss(student, one.collate([0, 1])).item(), rel=1e-5)


# --- what cannot be used ----------------------------------------------------------------------------------------


def test_a_layer_map_out_of_range(llama: Path, tmp_path: Path) -> None:
    assert check_layer_map(None, 3, 9) == {0: 0, 1: 4, 2: 8}
    assert check_layer_map({2: 7}, 3, 9) == {2: 7}
    for given, message in (({3: 0}, "student has 3 layers"), ({0: 9}, "teacher has 9 layers"), ({-1: 0}, "student")):
        with pytest.raises(UsageError, match=message):
            check_layer_map(given, 3, 9)
    config = DistillConfig(losses=LossWeights(hidden=1), layer_map={0: 2})
    with pytest.raises(UsageError, match=r"layer_map maps 0 to 2, but the teacher has 2 layers"):
        teach(llama, chats(tmp_path / "data"), make_draft(tmp_path), config, teacher_folder=llama)


def test_a_loss_that_is_no_number_is_named_before_training(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data", 1)
    folder = keep(llama, dataset, tmp_path / "signals")
    records = np.load(folder / "tokens_train.npy", mmap_mode="r+")
    records["logs"] = np.nan
    records.flush()
    events: list[Progress] = []
    config = DistillConfig(losses=LossWeights(gold=1, jsd=1))
    with pytest.raises(ModelError, match="The loss jsd became nan"):
        teach(llama, dataset, make_draft(tmp_path), config, signals=[folder], progress=events.append)
    assert events == []


def test_no_teacher_to_stand_beside(llama: Path, tmp_path: Path) -> None:
    config = DistillConfig(losses=LossWeights(hidden=1))
    with pytest.raises(ModelError, match="need the teacher itself: gold, hidden"):
        teach(llama, chats(tmp_path / "data"), make_draft(tmp_path), config)
