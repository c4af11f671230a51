"""Language models for open tasks: which tokens are learnt, LoRA merged, students that speak through the chat layer."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from train_helpers import make_dataset, make_draft
from transformers import AutoModelForCausalLM

from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError
from slmops.progress import Progress
from slmops.recipe import StudentConfig, TeacherConfig, TrainConfig
from slmops.train import adapt_generator, train_generator_student
from slmops.train.generator.answers import EncodedRow, collate_rows, encode_rows, supervised_logits

ANSWERS = {
    "where is my card": "it is lost",
    "what is the fee": "no fee",
    "what is my balance": "please tell me",
    "hello": "hello how are you",
}
FP32 = TrainConfig(precision="fp32", batch_size=4, epochs=40, learning_rate=5e-3)


def to_messages(row: Row) -> tuple[Message, ...]:
    return row.messages


def chat_rows(copies: int) -> list[Row]:
    return [
        Row(f"{copy}-{number}", (Message("user", question),), answer)
        for copy in range(copies)
        for number, (question, answer) in enumerate(ANSWERS.items())
    ]


def chats(folder: Path, copies: int = 4) -> Dataset:
    return make_dataset(folder, {"train": chat_rows(copies), "validation": chat_rows(1), "test": chat_rows(1)})


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answer_loss(model: Any, folder: Path, rows: list[Row]) -> float:
    """Mean cross-entropy of the answers' tokens, one row at a time, from the full logits."""
    tokenizer, losses = ChatTokenizer.load(folder), []
    for row in rows:
        chat = tokenizer.encode_training(row.messages, row.target or "")
        with torch.no_grad():
            logits = model(torch.tensor([chat.input_ids])).logits[0]
        for position in range(1, len(chat.input_ids)):
            if chat.loss_mask[position]:
                losses.append(F.cross_entropy(logits[position - 1], torch.tensor(chat.input_ids[position])).item())
    return sum(losses) / len(losses)


# --- which tokens are learnt ------------------------------------------------------------------------------------


def batch_of(llama: Path) -> tuple[list[EncodedRow], dict[str, torch.Tensor]]:
    rows = encode_rows(ChatTokenizer.load(llama), chat_rows(1), to_messages, 512)
    return rows, collate_rows(rows)


@pytest.mark.parametrize("adapter", [False, True])
def test_supervised_logits_are_those_of_the_whole(llama: Path, adapter: bool) -> None:
    model = load(llama)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    rows, batch = batch_of(llama)
    with torch.no_grad():
        found, targets = supervised_logits(model, batch)
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected, expected_targets = [], []
    for index, row in enumerate(rows):
        for position in range(1, len(row.tokens)):
            if row.supervised[position]:
                expected.append(whole[index, position - 1])
                expected_targets.append(row.tokens[position])
    assert targets.tolist() == expected_targets
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert found.shape == (sum(map(sum, (row.supervised for row in rows))), 300)


def test_padding_changes_no_logit(llama: Path) -> None:
    model = load(llama)
    rows, batch = batch_of(llama)
    assert len({len(row.tokens) for row in rows}) > 1
    with torch.no_grad():
        together, _ = supervised_logits(model, batch)
        alone = torch.cat([supervised_logits(model, collate_rows([row]))[0] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_encode_rows_learns_the_answer_and_its_end(llama: Path) -> None:
    tokenizer = ChatTokenizer.load(llama)
    [row] = encode_rows(tokenizer, [Row("a", (Message("user", "hello"),), "it is lost")], to_messages, 512)
    learnt = [token for token, on in zip(row.tokens, row.supervised, strict=True) if on]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "it is lost<|im_end|>"


def test_encode_rows_cuts_and_drops(llama: Path) -> None:
    tokenizer = ChatTokenizer.load(llama)
    short = Row("a", (Message("user", "hello"),), "it is lost")
    long = Row("b", (Message("user", "hello " * 50),), "it is lost")
    wordy = Row("c", (Message("user", "hello"),), "it is lost " * 50)
    unanswered = Row("d", (Message("user", "hello"),), None)
    whole = encode_rows(tokenizer, [short, long, wordy, unanswered], to_messages, 512)
    assert len(whole) == 3
    prompt = len(tokenizer.encode_prompt(short.messages))
    cut = encode_rows(tokenizer, [short, long, wordy, unanswered], to_messages, prompt + 2)
    assert [row.tokens for row in cut] == [whole[0].tokens[: prompt + 2], whole[2].tokens[: prompt + 2]]
    assert all(row.supervised == [False] * prompt + [True] * 2 for row in cut)
    assert encode_rows(tokenizer, [short], to_messages, prompt) == []


# --- teachers ---------------------------------------------------------------------------------------------------


def adapt(llama: Path, dataset: Dataset, draft: Draft, *, progress: Any = None, **teacher: Any) -> None:
    config = TeacherConfig(**{"adapt_epochs": 20, "learning_rate": 1e-2, **teacher})
    sinks = {} if progress is None else {"progress": progress}
    adapt_generator(llama, dataset, to_messages, config, FP32, 0, draft, **sinks)


@pytest.mark.parametrize("method", [None, "full"])
def test_adapting_lowers_the_loss_and_what_is_saved_is_what_was_trained(
    llama: Path, tmp_path: Path, method: Any
) -> None:
    """The last validation ran through the adapter; the folder holds the merged weights: the same loss."""
    dataset, draft = chats(tmp_path / "data"), make_draft(tmp_path)
    adapt(llama, dataset, draft, adapt_method=method)
    rows = list(dataset.rows("validation"))
    before, after = answer_loss(load(llama), llama, rows), answer_loss(load(draft.path), draft.path, rows)
    assert after < 0.5 * before
    assert after == pytest.approx(draft.metrics["validation_loss"], rel=1e-3)
    assert draft.metrics["validation_perplexity"] == pytest.approx(math.exp(draft.metrics["validation_loss"]))
    assert draft.metrics["rows_trained"] == 16
    names = {path.name for path in draft.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "history.json"} <= names
    assert not [name for name in names if "adapter" in name]
    weights = load_file(draft.path / "model.safetensors")
    assert weights.keys() == load_file(llama / "model.safetensors").keys()
    assert (draft.path / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_lora_leaves_embeddings_and_norms(llama: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    adapt(llama, chats(tmp_path / "data"), draft, adapt_epochs=1)
    before, after = load_file(llama / "model.safetensors"), load_file(draft.path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}


def test_it_answers_as_it_was_taught(llama: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    adapt(llama, chats(tmp_path / "data", 6), draft, adapt_method="full", adapt_epochs=40, learning_rate=5e-3)
    from slmops.runtime import GenerationRequest, open_generator

    generator = open_generator(draft.path)
    for question, answer in ANSWERS.items():
        found = generator.generate([GenerationRequest((Message("user", question),), max_tokens=40, temperature=0.0)])
        assert found[0].text == answer
    generator.close()


@pytest.mark.parametrize("lora", [True, False])
def test_adapting_goes_on_where_it_was_stopped(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    import slmops.train.loop as loop

    dataset, whole, cut = chats(tmp_path / "data"), make_draft(tmp_path / "whole"), make_draft(tmp_path / "cut")
    more: dict[str, Any] = {"adapt_epochs": 3, "adapt_method": "lora" if lora else "full"}
    adapt(llama, dataset, whole, **more)
    on_step_end = loop._Watch.on_step_end

    def saving(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        control.should_save = True

    monkeypatch.setattr(loop._Watch, "on_step_end", saving)

    def stop(event: Progress) -> None:
        if event.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(llama, dataset, cut, progress=stop, **more)
    assert sorted(cut.work.rglob("checkpoint-6"))
    events: list[Progress] = []
    adapt(llama, dataset, cut, progress=events.append, **more)
    assert events[0].done == 7
    for name in ("model.safetensors", "history.json"):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes(), name


# --- students ---------------------------------------------------------------------------------------------------


def teach(llama: Path, dataset: Dataset, draft: Draft, student: StudentConfig, train: TrainConfig = FP32) -> None:
    train_generator_student(dataset, llama, to_messages, student, train, 0, draft)


@pytest.mark.parametrize("vocabulary", ["trim", "keep"])
def test_a_cut_student_learns_and_speaks(llama: Path, tmp_path: Path, vocabulary: Any) -> None:
    dataset, draft = chats(tmp_path / "data", 6), make_draft(tmp_path)
    teach(llama, dataset, draft, StudentConfig(layers=1, vocabulary=vocabulary))
    config = json.loads((draft.path / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert (config["vocab_size"] < 300) == (vocabulary == "trim")
    assert draft.metrics["parameters"] == sum(w.numel() for w in load_file(draft.path / "model.safetensors").values())
    rows = list(dataset.rows("validation"))
    assert answer_loss(load(draft.path), draft.path, rows) == pytest.approx(draft.metrics["validation_loss"], rel=1e-3)
    assert draft.metrics["validation_loss"] < 1.0
    from slmops.runtime import GenerationRequest, open_generator

    generator = open_generator(draft.path)
    requests = [GenerationRequest((Message("user", q),), max_tokens=40, temperature=0.0) for q in ANSWERS]
    found = [generator.generate([request])[0] for request in requests]
    assert [answer.text for answer in found] == list(ANSWERS.values())
    assert {answer.finish_reason for answer in found} == {"stop"}, "the end of a turn has another id now"
    unseen = GenerationRequest((Message("user", "Grüße aus 東京 😀"),), max_tokens=5, temperature=0.0)
    assert generator.generate([unseen])[0].completion_tokens > 0
    generator.close()


def test_a_named_student_is_taken_whole(llama: Path, tmp_path: Path) -> None:
    dataset, draft = chats(tmp_path / "data"), make_draft(tmp_path)
    train = TrainConfig(precision="fp32", batch_size=4, epochs=1)
    teach(llama, dataset, draft, StudentConfig(model="x"), train)
    config = json.loads((draft.path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (2, 300)
    assert (draft.path / "tokenizer.json").exists()


def test_two_students_are_the_same(llama: Path, tmp_path: Path) -> None:
    dataset, drafts = chats(tmp_path / "data"), [make_draft(tmp_path / name) for name in "ab"]
    train = TrainConfig(precision="fp32", batch_size=4, epochs=2)
    for draft in drafts:
        teach(llama, dataset, draft, StudentConfig(layers=1), train)
    files = [{path.name: path.read_bytes() for path in draft.path.iterdir()} for draft in drafts]
    assert files[0] == files[1]


# --- what cannot be used ----------------------------------------------------------------------------------------


def test_no_answer_fits(llama: Path, tmp_path: Path) -> None:
    train = TrainConfig(precision="fp32", max_tokens=5)
    with pytest.raises(DataError, match="No row of the train split has an answer that fits into 5 tokens") as caught:
        teach(llama, chats(tmp_path / "data"), make_draft(tmp_path), StudentConfig(layers=1), train)
    assert "Raise train.max_tokens" in (caught.value.remedy or "")


def test_no_validation_answers(llama: Path, tmp_path: Path) -> None:
    dataset = make_dataset(
        tmp_path / "data", {"train": chat_rows(1), "validation": [Row("v", (Message("user", "hello"),), None)]}
    )
    with pytest.raises(DataError, match="No row of the validation split"):
        teach(llama, dataset, make_draft(tmp_path), StudentConfig(layers=1))


def test_a_model_that_cannot_chat(llama: Path, tmp_path: Path) -> None:
    from slmops.errors import ModelError

    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, work in (
        ("a", lambda draft: adapt(folder, chats(tmp_path / "data-a"), draft)),
        ("b", lambda draft: teach(folder, chats(tmp_path / "data-b"), draft, StudentConfig(layers=1))),
    ):
        with pytest.raises(ModelError, match="has no chat template"):
            work(make_draft(tmp_path / name))
