"""The torch engine on tiny models with random weights, against transformers' own generate and plain log-softmax."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.artifacts import Message
from slmops.errors import ContextLengthError, ModelError, ModelNotFoundError, UsageError
from slmops.runtime import GenerationRequest, open_classifier, open_generator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from slmops.runtime import torch_generator  # noqa: E402 (after the skip)
from slmops.runtime.torch_generator import Answer, TorchGenerator, choose, plan_batches  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = [
    "hi",
    "The card has not arrived yet",
    "Was kostet das, bitte? Zwei Stück für 3,50 €.",
    "日本語 🏳️‍🌈",
    "one two three four five six seven eight nine ten eleven twelve",
    "a",
    "Where is my money? I sent it three days ago and nobody has an answer for me.",
]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def _write(folder: Path, model_type: str, **more: Any) -> Path:
    """A tiny model whose next token is clear-cut: large random weights."""
    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 160,
        "initializer_range": 0.3,
    }
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **more})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    gemma = {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 8}
    return {
        "llama": _write(root / "llama", "llama"),
        "gemma2": _write(root / "gemma2", "gemma2", **gemma),
        "qwen3": _write(root / "qwen3", "qwen3", tie_word_embeddings=True),
        "gpt2": _write(root / "gpt2", "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=160),
    }


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> TorchGenerator:
    return TorchGenerator.load(folders["llama"])


def _ask(text: str, **options: Any) -> GenerationRequest:
    return GenerationRequest((Message("user", text),), **{"max_tokens": 12, **options})


def _new_ids(generator: TorchGenerator, folder: Path, request: GenerationRequest) -> list[int]:
    """Plain: transformers' own greedy search, one request at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = generator.chat.encode_prompt(request.messages)
    ends = list(generator.chat.eos_token_ids)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=request.max_tokens,
        eos_token_id=ends,
        pad_token_id=0,
    )
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2"])
def test_greedy_equals_transformers_one_by_one(folders: dict[str, Path], name: str) -> None:
    generator = TorchGenerator.load(folders[name])
    requests = [_ask(text, max_tokens=4 + 3 * index) for index, text in enumerate(TEXTS)]
    together = generator.generate(requests)
    for request, answer in zip(requests, together, strict=True):
        ids = _new_ids(generator, folders[name], request)
        assert answer.text == generator.chat.decode(ids)
        assert answer.prompt_tokens == len(generator.chat.encode_prompt(request.messages))
        assert answer.completion_tokens == len([i for i in ids if i not in generator.chat.eos_token_ids])
        assert answer.finish_reason == ("stop" if ids[-1] in generator.chat.eos_token_ids else "length")
        alone = generator.generate([request])[0]
        assert (alone.text, alone.finish_reason) == (answer.text, answer.finish_reason)
        assert alone.logprob == pytest.approx(answer.logprob, abs=1e-3)


def test_stops_at_every_token_that_ends_a_turn(folders: dict[str, Path], tmp_path: Path) -> None:
    """A token that the model writes in the middle of its answers is declared an end, by generation_config.json."""
    folder = tmp_path / "ends"
    shutil.copytree(folders["llama"], folder)
    before = TorchGenerator.load(folder)
    ids = _new_ids(before, folder, _ask(TEXTS[1]))
    ender = ids[5]
    cut = ids.index(ender)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ender]}), "utf-8")
    generator = TorchGenerator.load(folder)
    answers = generator.generate([_ask(TEXTS[1]), _ask(TEXTS[4], max_tokens=30)])
    assert answers[0].text == before.chat.decode(ids[:cut])
    assert (answers[0].finish_reason, answers[0].completion_tokens) == ("stop", cut)
    assert answers[0].logprob is not None
    # Its log-probability counts the end, as score() does where the template's own end is meant.
    shorter = before.generate([_ask(TEXTS[1], max_tokens=cut + 1)])[0]
    assert answers[0].logprob == pytest.approx(shorter.logprob, abs=1e-4)
    # Once its neighbour has left the batch, the other goes on as if alone.
    assert answers[1].text == generator.generate([_ask(TEXTS[4], max_tokens=30)])[0].text


def test_stop_texts_end_an_answer_before_them(llama: TorchGenerator) -> None:
    whole = llama.generate([_ask(TEXTS[4], max_tokens=20)])[0]
    assert whole.finish_reason == "length"
    middle = whole.text[len(whole.text) // 2 :][:3]
    expected = whole.text[: whole.text.find(middle)]
    request = _ask(TEXTS[4], max_tokens=20, stop=("never there", middle))
    plain = _ask(TEXTS[1], max_tokens=20)
    stopped, other = llama.generate([request, plain])
    assert (stopped.text, stopped.finish_reason) == (expected, "stop")
    assert stopped.completion_tokens < whole.completion_tokens
    assert other.text == llama.generate([plain])[0].text
    assert "".join(delta.text for delta in llama.stream(request)) == expected


def test_stream_equals_generate(llama: TorchGenerator) -> None:
    for text in TEXTS:
        request = _ask(text, max_tokens=25)
        whole = llama.generate([request])[0]
        deltas = list(llama.stream(request))
        assert "".join(delta.text for delta in deltas) == whole.text
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        last = deltas[-1]
        assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == (
            whole.finish_reason,
            whole.prompt_tokens,
            whole.completion_tokens,
        )
        assert len(deltas) > 5


def test_closing_a_stream_stops_the_work(llama: TorchGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    forward = TorchGenerator._forward

    def counting(self: TorchGenerator, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(self, *args)

    monkeypatch.setattr(TorchGenerator, "_forward", counting)
    stream = llama.stream(_ask(TEXTS[4], max_tokens=60))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert steps < 5
    assert not torch.is_inference_mode_enabled()


# Sampling


def test_a_seed_repeats_a_sample_whatever_its_neighbours(llama: TorchGenerator) -> None:
    request = _ask(TEXTS[1], temperature=0.8, top_p=0.9, seed=3)
    alone = llama.generate([request])[0]
    neighbours = [_ask(text, temperature=0.8, top_p=0.9, seed=seed) for seed, text in enumerate(TEXTS)]
    greedy = _ask(TEXTS[1])
    mixed = llama.generate([*neighbours, request, greedy])
    assert mixed[-2].text == alone.text
    assert mixed[-1].text == llama.generate([greedy])[0].text
    others = llama.generate([_ask(TEXTS[1], temperature=2.0, seed=seed) for seed in range(6)])
    assert len({answer.text for answer in others}) > 3
    unseeded = llama.generate([_ask(TEXTS[1], temperature=2.0) for _ in range(6)])
    assert len({answer.text for answer in unseeded}) > 3


def test_sampling_follows_temperature_and_top_p(llama: TorchGenerator) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    request = _ask("x", temperature=0.5, top_p=0.95, seed=0)
    answer = Answer(request, [1], 1, llama.chat)
    draws = 4000
    counts = [0, 0, 0, 0]
    for _ in range(draws):
        tokens, logprobs = choose(logits[None], [answer])
        counts[tokens[0]] += 1
        assert logprobs[0] == pytest.approx(torch.log_softmax(logits, -1)[tokens[0]].item(), abs=1e-6)
    weights = [math.exp(value / 0.5) for value in logits.tolist()]
    total = sum(weights)
    assert weights[0] / total < 0.95 < (weights[0] + weights[1]) / total  # so two tokens are left
    assert counts[2] == counts[3] == 0
    assert counts[0] / draws == pytest.approx(weights[0] / (weights[0] + weights[1]), abs=0.03)


def test_batches_are_alike_sorted_and_bounded(llama: TorchGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(tokens: int, **options: Any) -> Answer:
        return Answer(_ask("x", **options), [1] * tokens, 12, llama.chat)

    mixed = [answer(5), answer(3, temperature=1.0), answer(2), answer(9, temperature=1.0, top_p=0.5), answer(7)]
    batches = plan_batches(mixed)
    assert [[len(a.prompt) for a in batch] for batch in batches] == [[2, 5, 7], [9], [3]]
    monkeypatch.setattr(torch_generator, "BATCH_TOKENS", 60)
    lengths = [[len(a.prompt) for a in batch] for batch in plan_batches([answer(n) for n in (3, 8, 3, 100, 8, 3)])]
    assert lengths == [[3, 3, 3], [8, 8], [100]]
    monkeypatch.setattr(torch_generator, "BATCH_ROWS", 2)
    assert max(map(len, plan_batches([answer(3) for _ in range(7)]))) == 2
    assert plan_batches([]) == []


# Scores


def _plain_score(generator: TorchGenerator, folder: Path, messages: tuple[Message, ...], target: str) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    encoded = generator.chat.encode_training(messages, target)
    with torch.no_grad():
        logprobs = model(torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
    return sum(
        logprobs[position - 1, encoded.input_ids[position]].item()
        for position, counts in enumerate(encoded.loss_mask)
        if counts
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2"])
def test_scores_equal_a_plain_reference(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TorchGenerator.load(folders[name])
    pairs = [((Message("user", text),), TEXTS[-1 - index]) for index, text in enumerate(TEXTS)]
    pairs.append(((Message("system", "s"), Message("user", "u")), ""))
    expected = [_plain_score(generator, folders[name], messages, target) for messages, target in pairs]
    for tokens, logits in ((4096, 2**26), (150, 2**26), (4096, 1), (4096, 400 * 40)):
        monkeypatch.setattr(torch_generator, "SCORE_TOKENS", tokens)
        monkeypatch.setattr(torch_generator, "SCORE_LOGITS", logits)
        scores = generator.score(pairs)
        assert [score.logprob for score in scores] == pytest.approx(expected, abs=2e-3)
    for score, (messages, target) in zip(scores, pairs, strict=True):
        assert score.tokens == sum(generator.chat.encode_training(messages, target).loss_mask)
        assert score.bytes == len(target.encode())


def test_logits_only_where_a_token_is_scored(llama: TorchGenerator) -> None:
    shapes = []
    hook = llama._model.get_output_embeddings().register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape)))
    pairs = [((Message("user", TEXTS[-1]),), "arrival"), ((Message("user", "hi"),), "x")]
    try:
        scores = llama.score(pairs)
        assert shapes == [(1, sum(score.tokens for score in scores), 400)]
        shapes.clear()
        llama.generate([_ask(TEXTS[-1], max_tokens=2)])
        assert shapes[0] == (1, 1, 400)  # of the prompt, only the last position
    finally:
        hook.remove()


def test_a_greedy_answer_scores_what_it_was_generated_with(llama: TorchGenerator) -> None:
    messages = (Message("user", TEXTS[4]),)
    answer = llama.generate([GenerationRequest(messages, max_tokens=5)])[0]
    ids = llama.chat.encode(answer.text, add_special_tokens=False)
    if len(ids) != answer.completion_tokens:
        pytest.fail("choose another text: this one is not encoded as it was generated")
    encoded = llama.chat.encode_training(messages, answer.text)
    ending = _plain_end(llama, encoded.input_ids[: encoded.loss_mask.index(True) + len(ids)])
    assert answer.logprob is not None
    assert llama.score([(messages, answer.text)])[0].logprob == pytest.approx(answer.logprob + ending, abs=1e-3)


def _plain_end(generator: TorchGenerator, ids: list[int]) -> float:
    with torch.no_grad():
        logits = generator._model(torch.tensor([ids])).logits[0, -1]
    value: float = logits.log_softmax(-1)[generator.chat.eos_token_ids[0]].item()
    return value


# Precision, adapters


def test_bf16_is_near_fp32(folders: dict[str, Path], llama: TorchGenerator) -> None:
    half = TorchGenerator.load(folders["llama"], precision="bf16")
    assert next(half._model.parameters()).dtype == torch.bfloat16
    pair = ((Message("user", TEXTS[1]),), "arrival")
    assert half.score([pair])[0].logprob == pytest.approx(llama.score([pair])[0].logprob, rel=0.05)
    assert half.generate([_ask(TEXTS[1])])[0].completion_tokens > 0


def test_an_adapter_is_merged(folders: dict[str, Path], tmp_path: Path, llama: TorchGenerator) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    torch.manual_seed(5)
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(tmp_path / "adapter")
    generator = TorchGenerator.load(folders["llama"], adapter=tmp_path / "adapter")
    encoded = generator.chat.encode_training((Message("user", "hi"),), "arrival")
    with torch.no_grad():
        logprobs = tuned.eval()(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    expected = sum(
        logprobs[at - 1, encoded.input_ids[at]].item() for at, counts in enumerate(encoded.loss_mask) if counts
    )
    pair = ((Message("user", "hi"),), "arrival")
    assert generator.score([pair])[0].logprob == pytest.approx(expected, abs=2e-3)
    assert abs(llama.score([pair])[0].logprob - expected) > 0.05
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json"):
        TorchGenerator.load(folders["llama"], adapter=tmp_path)
    with pytest.raises(ModelError, match="does not fit"):
        TorchGenerator.load(folders["gpt2"], adapter=tmp_path / "adapter")


# Bad input


def test_context_bounds(llama: TorchGenerator) -> None:
    room = 160 - len(llama.chat.encode_prompt((Message("user", "hi"),)))
    answer = llama.generate([_ask("hi", max_tokens=10_000)])[0]
    assert answer.completion_tokens <= room
    assert answer.finish_reason == ("length" if answer.completion_tokens == room else "stop")
    with pytest.raises(ContextLengthError, match="160"):
        llama.generate([_ask("hi"), _ask("x y " * 200)])
    with pytest.raises(ContextLengthError):
        llama.stream(_ask("x y " * 200))
    with pytest.raises(ContextLengthError):
        llama.score([((Message("user", "hi"),), "x y " * 200)])


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_settings_that_mean_nothing(llama: TorchGenerator, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        llama.generate([_ask("hi", **options)])


def test_nothing_asked(llama: TorchGenerator) -> None:
    assert llama.generate([]) == []
    assert llama.score([]) == []


def test_bad_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        TorchGenerator.load(tmp_path)
    truncated = tmp_path / "truncated"
    shutil.copytree(folders["llama"], truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        TorchGenerator.load(truncated)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        TorchGenerator.load(truncated)


def test_a_classifier_is_not_taken_for_a_generator(folders: dict[str, Path], tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folders["llama"], num_labels=3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    shutil.copy(folders["llama"] / "tokenizer.json", tmp_path)
    with pytest.raises(ModelError, match="lacks 1 weights"):
        TorchGenerator.load(tmp_path)


# Opening


def test_open_generator(folders: dict[str, Path], tmp_path: Path) -> None:
    assert isinstance(open_generator(folders["llama"]), TorchGenerator)  # a plain folder of transformers
    described = tmp_path / "described"
    shutil.copytree(folders["llama"], described)
    description: dict[str, Any] = {"runtime": "torch", "form": "generator"}
    (described / "slmops.json").write_text(json.dumps(description), "utf-8")
    generator = open_generator(described, threads=1)
    assert isinstance(generator, TorchGenerator)
    assert generator.generate([_ask("hi", max_tokens=2)])[0].completion_tokens > 0
    generator.close()
    with pytest.raises(ModelError, match="holds a generator, not a classifier"):
        open_classifier(described)
    (described / "slmops.json").write_text(json.dumps({**description, "runtime": "openai"}), "utf-8")
    with pytest.raises(ModelError, match=r"'openai'.*torch, onnx-genai"):
        open_generator(described)
    classifier = {"runtime": "tea", "form": "classifier", "labels": ["a", "b"]}
    (described / "slmops.json").write_text(json.dumps(classifier), "utf-8")
    with pytest.raises(ModelError, match=r"'tea'.*onnx, torch"):
        open_classifier(described)
    with pytest.raises(ModelError, match="holds a classifier, not a generator"):
        open_generator(described)
    with pytest.raises(ModelNotFoundError, match=r"slmops\.json"):
        open_generator(tmp_path)
