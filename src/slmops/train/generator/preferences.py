"""Learning from pairs of answers of which one is better: direct preference optimization, through trl's DPOTrainer.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model": the loss is
``-log sigmoid(beta * ((log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected))))``, where p0 is the
model before. Prompts and answers become tokens by our chat layer, so that what is learnt is what the model is asked in.

Guarantees: bad pairs are named by row before a model is loaded; a run that was killed goes on from its last checkpoint;
the margins before and after are in the metrics, on pairs held out of the training where there are enough
(:data:`HELD_OUT_FROM`). Not guaranteed: that answers get better; a model that is pushed too far away (a large learning
rate, a small beta) forgets how to speak.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.artifacts import Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError, MissingExtraError, ModelError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import PreferencesConfig, TrainConfig

logger = logging.getLogger(__name__)

TASK = "preferences"
HELD_OUT_FROM = 20  # pairs from which a tenth is held out to measure on
MOST_MEASURED = 200
_KEYS = "{prompt or messages, chosen, rejected}"

ToMessages = Callable[[Row], tuple[Message, ...]]


@dataclass(frozen=True)
class Pair:
    """``messages``: the conversation that both answers are to."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class EncodedPair:
    """Token ids. Each answer ends with the token that ends the turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs in a jsonl file, each ``{prompt or messages, chosen, rejected}``.

    Raises:
        DataError: there is no such file, no pair in it, or one that cannot be learnt from; names the row.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"There is no file of pairs at {path}.", remedy="Set train.preferences.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The pairs cannot be read: {error}.", path=path) from None
    pairs = [_pair(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise DataError("There is no pair.", path=path, remedy=f"Write one a line: {_KEYS}.")
    return pairs


def _pair(line: str, path: Path, number: int) -> Pair:
    remedy = f"A line is {_KEYS}."
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"This is not JSON: {error}.", path=path, row=number, remedy=remedy) from None
    if not isinstance(raw, dict):
        raise DataError(f"A pair is an object, not a {type(raw).__name__}.", path=path, row=number, remedy=remedy)
    if ("prompt" in raw) == ("messages" in raw):
        raise DataError(
            "A pair has either prompt or messages, and this one has "
            + ("both." if "prompt" in raw else f"neither; its keys are {', '.join(sorted(raw)) or 'none'}."),
            path=path,
            row=number,
            remedy=remedy,
        )
    for key in ("chosen", "rejected"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise DataError(f"{key} is {raw.get(key)!r}, not a text.", path=path, row=number, remedy=remedy)
    if raw["chosen"].strip() == raw["rejected"].strip():
        raise DataError(
            f"chosen equals rejected ({raw['chosen'].strip()[:40]!r}).", path=path, row=number, remedy="Take it out."
        )
    return Pair(_messages(raw, path, number), raw["chosen"], raw["rejected"])


def _messages(raw: Mapping[str, Any], path: Path, number: int) -> tuple[Message, ...]:
    if "prompt" in raw:
        if not isinstance(raw["prompt"], str) or not raw["prompt"].strip():
            raise DataError(f"prompt is {raw['prompt']!r}, not a text.", path=path, row=number)
        return (Message("user", raw["prompt"]),)
    turns = raw["messages"]
    good = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not good or not turns or turns[-1]["role"] != "user":
        raise DataError(
            "messages is not a conversation that ends with the user.",
            path=path,
            row=number,
            remedy='For example [{"role": "user", "content": "..."}].',
        )
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def encode_pairs(
    tokenizer: ChatTokenizer, pairs: Sequence[Pair], to_messages: ToMessages, max_tokens: int
) -> list[EncodedPair]:
    """Pairs of at most ``max_tokens`` each way; longer ones are left out, because a cut answer has no preference.

    Where a token holds the end of the prompt and the beginning of an answer, it counts as answer on both sides.
    """
    encoded = []
    for pair in pairs:
        messages = to_messages(Row("", pair.messages))
        sides = []
        for answer in (pair.chosen, pair.rejected):
            chat = tokenizer.encode_training(messages, answer)
            length = len(chat.loss_mask) - chat.loss_mask[::-1].index(True) if any(chat.loss_mask) else 0
            sides.append((chat.input_ids[:length], chat.prompt_tokens))
        (chosen, first), (rejected, second) = sides
        shared = _shared_prefix(chosen[:first], rejected[:second])
        if max(len(chosen), len(rejected)) <= max_tokens and chosen != rejected:
            encoded.append(EncodedPair(chosen[:shared], chosen[shared:], rejected[shared:]))
    return encoded


def _shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def mean_margin(model: Any, pairs: Sequence[EncodedPair]) -> dict[str, float]:
    """``margin``: mean of log p(chosen) - log p(rejected), in nats an answer; ``accuracy``: share of pairs above 0."""
    import torch

    margins = []
    with torch.no_grad():
        for pair in pairs:
            chosen, rejected = (_log_probability(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
            margins.append(chosen - rejected)
    return {
        "margin": sum(margins) / len(margins),
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
    }


def _log_probability(model: Any, prompt: list[int], answer: list[int]) -> float:
    import torch

    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return float(logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).sum())


def learn_preferences(
    student: Path,
    pairs_file: Path,
    config: PreferencesConfig,
    train: TrainConfig,
    to_messages: ToMessages,
    seed: int,
    draft: Draft,
    *,
    progress: ProgressSink = ignore,
) -> None:
    """Train the language model at ``student`` on pairs, and write it with the rest of its folder to ``draft``.

    Raises:
        MissingExtraError: trl is not installed.
        DataError: as :func:`read_pairs`; or no pair fits into ``train.max_tokens``.
        ModelError: the loss became NaN or infinite.
    """
    pairs = read_pairs(pairs_file)
    check_trl()
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.models.quiet import quiet_transformers

    quiet_transformers()
    torch.manual_seed(seed)
    tokenizer = ChatTokenizer.load(student)
    encoded = encode_pairs(tokenizer, pairs, to_messages, train.max_tokens)
    if not encoded:
        raise DataError(
            f"None of {len(pairs)} pairs fits into {train.max_tokens} tokens.",
            path=pairs_file,
            remedy="Raise train.max_tokens.",
        )
    if left_out := len(pairs) - len(encoded):
        logger.warning("%d of %d pairs are longer than %d tokens and left out", left_out, len(pairs), train.max_tokens)
    trained, measured = _divided(encoded, seed)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    before = mean_margin(model, measured)
    history = _fit(model, tokenizer, trained, config, train, seed, draft.work, progress)
    after = mean_margin(model.eval(), measured)
    _write(model, student, history, draft)
    draft.metrics |= {
        "pairs": len(trained),
        "pairs_left_out": left_out,
        "pairs_measured": len(measured),
        "pairs_held_out": measured is not trained,
        "margin_before": before["margin"],
        "margin_after": after["margin"],
        "preference_accuracy_before": before["accuracy"],
        "preference_accuracy_after": after["accuracy"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def check_trl() -> None:
    """Raises :class:`MissingExtraError` where trl is not installed. Imports nothing."""
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise MissingExtraError("Learning from preferences (it needs trl)", "preferences")


def _divided(pairs: list[EncodedPair], seed: int) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Pairs to train on, and to measure on: a tenth of their own where there are enough, else the same."""
    if len(pairs) < HELD_OUT_FROM:
        return pairs, pairs
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    held = max(1, min(MOST_MEASURED, len(pairs) // 10))
    return shuffled[held:], shuffled[:held]


def _fit(
    model: Any,
    tokenizer: ChatTokenizer,
    pairs: Sequence[EncodedPair],
    config: PreferencesConfig,
    train: TrainConfig,
    seed: int,
    work: Path,
    progress: ProgressSink,
) -> list[dict[str, float]]:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from slmops.train.loop import last_checkpoint

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # tokens already, by our chat layer

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise ModelError(
                    f"The loss of the preferences became {loss} at step {state.global_step}.",
                    remedy="Lower train.preferences.learning_rate.",
                )
            note = f"loss {loss:.3f}, margin {(logs or {}).get('rewards/margins', 0.0):.3f}"
            progress(Progress(TASK, state.global_step, state.max_steps, "steps", note))

    steps = max(1, math.ceil(len(pairs) * config.epochs / config.batch_size))
    on_gpu = torch.cuda.is_available()
    pad_id, pad_before = tokenizer.pad_token_id, (model.config.pad_token_id, model.generation_config.pad_token_id)
    arguments = DPOConfig(
        output_dir=str(work / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        beta=config.beta,
        warmup_steps=max(1, steps // 10),
        lr_scheduler_type="cosine",
        max_length=None,
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / 5)),
        save_total_limit=1,
        seed=seed,
        bf16=on_gpu and train.precision != "fp32",
        fp16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
    )
    trainer = Trainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list(
            [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
        ),
        processing_class=_for_padding(PreTrainedTokenizerFast, tokenizer, pad_id),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    resumed = last_checkpoint(work / "checkpoints")
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    model.config.pad_token_id, model.generation_config.pad_token_id = pad_before
    names = {"rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy", "loss": "loss"}
    return [
        {"step": float(entry["step"]), **{name: float(entry[key]) for key, name in names.items() if key in entry}}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _for_padding(kind: Any, tokenizer: ChatTokenizer, pad_id: int) -> Any:
    """trl asks a tokenizer of transformers what to pad with, and nothing else of it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>" if token_id == pad_id else f"<{token_id}>": token_id for token_id in range(tokenizer.vocab_size)}
    return kind(tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<pad>")


def _write(model: Any, student: Path, history: list[dict[str, float]], draft: Draft) -> None:
    for path in sorted(student.iterdir()):
        weights = ".safetensors" in path.suffixes
        if path.is_file() and not weights and path.name not in {"manifest.json", "config.json"}:
            shutil.copyfile(path, draft.path / path.name)
    model.config.use_cache = True
    model.save_pretrained(draft.path)
    (draft.path / "preferences.json").write_text(json.dumps(history, indent=1), "utf-8")
