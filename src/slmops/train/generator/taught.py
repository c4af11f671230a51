"""Learning from a teacher's tokens: the weighted sum of all signals over a batch of answers.

Signals come from disk (:mod:`slmops.train.generator.signals`), or from the teacher beside the student, which never
learns. Logits exist at the tokens that are learnt, and for at most :data:`CHUNK_LOGITS` of them at once. All randomness
is torch's own, so that a resumed run goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmops.errors import ModelError, UsageError
from slmops.models.cut import evenly_spread
from slmops.models.scaled_logits import scaled_logits
from slmops.recipe import DISTRIBUTION_LOSSES, DistillConfig
from slmops.train.generator.answers import AnswerObjective, EncodedRow, collate_rows
from slmops.train.generator.signals import TeacherTokens, student_ids, to_student
from slmops.train.loop import Batch
from slmops.train.losses import (
    IGNORED_LABEL,
    attention_divergence,
    bucket_logits,
    confidence_weights,
    generalized_jsd,
    hidden_state_distance,
    in_chunks,
    reverse_divergence,
    softened_divergence,
    sorted_distance,
    weighted_sum,
)
from slmops.train.packing import packed_states

CHUNK_LOGITS = 1 << 24
"""64 MB in fp32."""


class Taught(nn.Module):
    """The student and the projections onto the teacher's hidden states that only training needs."""

    def __init__(self, student: Any, layer_map: Mapping[int, int], teacher_hidden_size: int) -> None:
        super().__init__()
        self.student = student
        width = text_config(base_of(student)).hidden_size
        self.projections = nn.ModuleDict({str(layer): nn.Linear(width, teacher_hidden_size) for layer in layer_map})

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Tensors that share memory (tied embeddings) once: safetensors writes no other way."""
        whole = super().state_dict(*args, **options)
        for name in self._repeated():
            whole.pop(name, None)
        return whole

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What :meth:`state_dict` gave."""
        again = {name: state_dict[first] for name, first in self._repeated().items() if first in state_dict}
        return super().load_state_dict({**again, **state_dict}, strict, assign)

    def _repeated(self) -> dict[str, str]:
        """Name -> the name under which the same tensor came before."""
        first: dict[int, str] = {}
        repeated: dict[str, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                repeated[name] = first[id(parameter)]
            else:
                first[id(parameter)] = name
        return repeated


def base_of(model: Any) -> Any:
    """The language model itself, under projections and adapters."""
    model = model.student if isinstance(model, Taught) else model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The sizes of the language model, also where it is a part of one that sees pictures (Gemma 3)."""
    return model.config.get_text_config()


def check_layer_map(given: Mapping[int, int] | None, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """``given``, or the student's layers spread evenly over the teacher's; layers count from 0.

    Raises:
        UsageError: a layer that is not there.
    """
    if given is None:
        return dict(enumerate(evenly_spread(student_layers, teacher_layers)))
    for ours, theirs in given.items():
        for name, layer, layers in (("student", ours, student_layers), ("teacher", theirs, teacher_layers)):
            if not 0 <= layer < layers:
                raise UsageError(
                    f"distill.layer_map maps {ours} to {theirs}, but the {name} has {layers} layers.",
                    remedy=f"Count them from 0: the last is {layers - 1}.",
                )
    return dict(given)


class OnlineTeacher:
    """A teacher beside the student. ``kept_ids``: the teacher's id of each of the student's tokens; None: the same."""

    def __init__(self, folder: Path, kept_ids: Sequence[int] | None, *, attentions: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        if attentions:
            self.model.set_attn_implementation("eager")
        self.kept = None if kept_ids is None else torch.tensor(kept_ids)

    @property
    def layers(self) -> int:
        return int(text_config(self.model).num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(text_config(self.model).hidden_size)

    @property
    def head(self) -> nn.Module:
        return cast(nn.Module, self.model.get_output_embeddings())

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **show: bool) -> Any:
        self.model.to(input_ids.device)
        if self.kept is not None:
            self.kept = self.kept.to(input_ids.device)
            input_ids = self.kept[input_ids]
        with torch.no_grad():
            return self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **show)


@dataclass
class _View:
    """What the teachers think of the batch's tokens. One of both: ``heard`` from disk, or ``states`` of the one that
    stands beside.
    """

    heard: list[tuple[Tensor, Tensor, Tensor]]
    weights: list[Tensor]
    known: list[Tensor]
    states: Tensor | None = None


class TaughtObjective(AnswerObjective):
    """The weighted sum of ``config.losses``. ``teachers``: from disk; ``online``: beside the student.

    ``eos_ids`` end an answer that the student writes; ``layer_map`` is complete; ``packed`` goes with signals from disk
    alone.
    """

    def __init__(
        self,
        rows: list[EncodedRow],
        validation_rows: list[EncodedRow],
        config: DistillConfig,
        *,
        teachers: Sequence[TeacherTokens] = (),
        online: OnlineTeacher | None = None,
        layer_map: Mapping[int, int] | None = None,
        eos_ids: Sequence[int] = (),
        packed: bool = False,
    ) -> None:
        super().__init__(rows, validation_rows, packed)
        self.config, self.teachers, self.online = config, list(teachers), online
        self.layer_map, self.eos_ids = dict(layer_map or {}), list(eos_ids)
        self.loss_weights = config.weights(closed=False)
        self.temperature = config.softness(closed=False)

    def collate(self, indices: Sequence[int]) -> Batch:
        """Beside the rows, of each teacher on disk what it thinks of the supervised tokens, row after row."""
        batch = super().collate(indices)
        for number, teacher in enumerate(self.teachers):
            heard = teacher.batch(indices)
            batch |= {
                f"teacher{number}_ids": heard.ids,
                f"teacher{number}_logs": heard.logs,
                f"teacher{number}_tail": heard.tail,
                f"teacher{number}_next": heard.following,
                f"teacher{number}_known": heard.known,
            }
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        student = base_of(model)
        own = torch.zeros(len(batch["input_ids"]), dtype=torch.bool, device=batch["input_ids"].device)
        if self.config.on_policy_share and model.training:
            batch, own = self._with_own_answers(student, batch)
        show = {
            "output_hidden_states": "hidden" in self.loss_weights,
            "output_attentions": "attention" in self.loss_weights,
        }
        show = {name: True for name, on in show.items() if on}
        out, theirs = None, None
        if self.packed:
            states, gold = packed_states(student, batch)[batch["predict"]], batch["targets"]
            view = self._view(batch, None)
        else:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            out = student.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **show)
            theirs = self.online(ids, mask, **show) if self.online is not None else None
            wanted = batch["supervised"][:, 1:].bool()
            states = out.last_hidden_state[:, :-1][wanted]
            gold = ids[:, 1:][wanted].masked_fill(own[:, None].expand_as(wanted)[wanted], IGNORED_LABEL)
            view = self._view(batch, None if theirs is None else theirs.last_hidden_state[:, :-1][wanted])
        compared = self.loss_weights.keys() & {"gold", "uld", *DISTRIBUTION_LOSSES}
        total = states.new_zeros((), dtype=torch.float32)
        if compared:
            head = student.get_output_embeddings()
            total = in_chunks(
                head,
                states,
                max(1, CHUNK_LOGITS // head.weight.shape[0]),
                lambda logits, rows: self._parts(scaled_logits(logits, student.config), rows, gold, view),
                self.loss_weights,
            )
        if show:
            total = total + weighted_sum(self._shown(model, out, theirs, batch["attention_mask"]), self.loss_weights)
        return total

    def validate(self, model: nn.Module) -> dict[str, float]:
        return super().validate(base_of(model))

    def _view(self, batch: Batch, states: Tensor | None) -> _View:
        """``states``: the last of the teacher that stands beside, at the tokens that are learnt."""
        if states is not None:
            return _View([], [], [], states)
        count = range(len(self.teachers))
        heard = [
            (batch[f"teacher{number}_ids"], batch[f"teacher{number}_logs"], batch[f"teacher{number}_tail"])
            for number in count
        ]
        known = [batch[f"teacher{number}_known"] for number in count]
        following = [batch[f"teacher{number}_next"] for number in count]
        equal = self.config.teacher_weights == "equal"
        return _View(heard, confidence_weights(following, equal=equal) if heard else [], known)

    def _parts(self, logits: Tensor, rows: slice, gold: Tensor, view: _View) -> dict[str, Tensor]:
        """Each loss over the tokens ``rows`` as its share of the mean over all tokens."""
        share = len(logits) / len(gold)
        parts: dict[str, Tensor] = {}
        if "gold" in self.loss_weights:
            summed = F.cross_entropy(logits.float(), gold[rows], ignore_index=IGNORED_LABEL, reduction="sum")
            parts["gold"] = summed / (gold != IGNORED_LABEL).sum().clamp(min=1)
        soft = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        for ours, theirs, weights, sorted_view in self._compared(soft, rows, view):
            found = self._divergences(ours, theirs, weights)
            if "uld" in self.loss_weights:
                logs, tail = sorted_view
                found["uld"] = sorted_distance(soft, logs, tail, weights)
            for name, value in found.items():
                parts[name] = parts.get(name, value.new_zeros(())) + share * value
        return parts

    def _divergences(self, ours: Tensor, theirs: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        """Of what is softened already."""
        square = self.temperature**2
        found: dict[str, Tensor] = {}
        if "forward_kl" in self.loss_weights:
            found["forward_kl"] = square * softened_divergence(ours, theirs, 1.0, weights)
        if "reverse_kl" in self.loss_weights:
            found["reverse_kl"] = square * reverse_divergence(ours, theirs, 1.0, weights)
        if "jsd" in self.loss_weights:
            found["jsd"] = square * generalized_jsd(ours, theirs, self.config.jsd_beta, 1.0, weights)
        return found

    def _compared(self, soft: Tensor, rows: slice, view: _View) -> Any:
        """For each teacher: the student's logits, the teacher's logarithms of the same width, weights of the tokens,
        and what :func:`sorted_distance` takes of the teacher.
        """
        divergent = bool(self.loss_weights.keys() & set(DISTRIBUTION_LOSSES))
        if view.states is not None and divergent:
            yield (*self._beside(soft, view.states[rows]), None, ())
        for (ids, logs, tail), weights, known in zip(view.heard, view.weights, view.known, strict=True):
            theirs = torch.cat([logs[rows], tail[rows, None]], dim=-1)
            ours = bucket_logits(soft, ids[rows]) if divergent else soft
            yield ours, theirs, weights[rows] * known[rows], (logs[rows], tail[rows])

    def _beside(self, soft: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        teacher = cast(OnlineTeacher, self.online)
        with torch.no_grad():
            logits = scaled_logits(teacher.head(states), teacher.model.config).float() / self.temperature
        if self.config.top_k is None:
            # Over the tokens that both have; softmax makes it a distribution again.
            shared = logits if teacher.kept is None else logits[:, teacher.kept]
            width = min(shared.shape[-1], soft.shape[-1])
            return soft[:, :width], shared[:, :width]
        logs = logits.log_softmax(dim=-1)
        best = logs.topk(min(self.config.top_k, logs.shape[-1] - 1), dim=-1)
        ids, kept = best.indices, best.values
        tail = logs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
        lookup = self._lookup(logs.shape[-1], soft.shape[-1], teacher)
        if lookup is not None:
            ids, kept, tail = to_student(ids, kept, tail, lookup)
        return bucket_logits(soft, ids), torch.cat([kept, tail[:, None]], dim=-1)

    def _lookup(self, vocabulary: int, ours: int, teacher: OnlineTeacher) -> Tensor | None:
        if not hasattr(self, "_lookup_kept"):
            kept = None if teacher.kept is None else teacher.kept.tolist()
            self._lookup_kept = student_ids(vocabulary, kept, ours)
        if self._lookup_kept is not None and teacher.kept is not None:
            self._lookup_kept = self._lookup_kept.to(teacher.kept.device)
        return self._lookup_kept

    def _shown(self, model: nn.Module, out: Any, theirs: Any, mask: Tensor) -> dict[str, Tensor]:
        """The losses of what is inside: the means over the pairs of ``layer_map``."""
        parts: dict[str, Tensor] = {}
        if "hidden" in self.loss_weights:
            projections, real = cast(Taught, model).projections, mask.bool()
            distances = []
            for ours, other in self.layer_map.items():
                target = theirs.hidden_states[other + 1][real].float()
                # Standardized token by token: a few dimensions of a language model's states are huge.
                target = F.layer_norm(target, target.shape[-1:])
                distances.append(
                    hidden_state_distance(projections[str(ours)](out.hidden_states[ours + 1][real]), target)
                )
            parts["hidden"] = torch.stack(distances).mean()
        if "attention" in self.loss_weights:
            parts["attention"] = torch.stack(
                [
                    attention_divergence(out.attentions[ours], theirs.attentions[other], mask)
                    for ours, other in self.layer_map.items()
                ]
            ).mean()
        return parts

    def _with_own_answers(self, student: Any, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with a share of its answers written by the student; which rows those are.

        Source: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        arXiv:2306.13649.
        """
        device = batch["input_ids"].device
        chosen = torch.rand(len(batch["input_ids"])) < self.config.on_policy_share
        if not bool(chosen.any()):
            return batch, chosen.to(device)
        rows = []
        for ids, mask, supervised in zip(
            batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["supervised"].tolist(), strict=True
        ):
            length = sum(mask)
            rows.append(EncodedRow(ids[:length], [bool(on) for on in supervised[:length]]))
        picked = [row for row, on in enumerate(chosen.tolist()) if on]
        prompts = [rows[row].tokens[: max(1, rows[row].supervised.index(True))] for row in picked]
        for row, prompt, answer in zip(picked, prompts, self._write(student, prompts, device), strict=True):
            rows[row] = EncodedRow([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        made = {name: tensor.to(device) for name, tensor in collate_rows(rows).items()}
        return {**batch, **made}, chosen.to(device)

    def _write(self, student: Any, prompts: Sequence[list[int]], device: torch.device) -> list[list[int]]:
        """A sampled answer to each prompt, its end included where it came."""
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=self.config.on_policy_tokens,
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.eos_ids[0] if self.eos_ids else 0,
            use_cache=True,
        )
        training = student.training
        student.eval()
        with torch.no_grad():
            written = student.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        student.train(training)
        answers = []
        for tokens in written[:, longest:].tolist():
            end = next((at for at, token in enumerate(tokens) if token in self.eos_ids), len(tokens) - 1)
            answers.append(tokens[: end + 1])
        return answers


def check_losses(model: nn.Module, objective: TaughtObjective) -> None:
    """One batch without learning, so that what cannot work is said before training starts.

    Raises:
        ModelError: a loss is no number.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        loss = objective.loss(model, objective.collate(range(min(2, len(objective.rows)))))
    if not bool(torch.isfinite(loss)):
        raise ModelError(f"The loss is {loss.item()} before training has started.", remedy="Look at the teacher.")
