"""``compress``: what is removed, in which precisions and formats the student is written, and by which algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from slmops.recipe.distill import LossWeights
from slmops.recipe.section import Precision, Section, Share

GgufQuantization = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "q5_0", "q5_1", "q4_0", "q4_1"
]
FormatName = Literal["gguf", "openvino", "olive", "onnx-adapters"]
QUANTIZATIONS: Mapping[str, tuple[str, ...]] = {
    "gguf": get_args(GgufQuantization),
    "openvino": get_args(Precision),
    "olive": (),
    "onnx-adapters": ("fp32", "int8", "int4"),
}
"""How the weights of each format may be stored; the first word of a short form (``gguf:q4_k_m``) is the format."""
DEFAULT_QUANTIZATIONS: Mapping[str, str] = {"gguf": "q4_k_m", "openvino": "int8", "onnx-adapters": "fp32"}


class FormatConfig(Section):
    """One more variant of the student, for another engine or made by another tool."""

    format: FormatName
    quantization: str | None = Field(None, description="how weights are stored; null: the format's default")
    config: str | None = Field(None, description="olive: its configuration file, with the passes it shall run")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")] | None = Field(
        None, description="of the variant; null: format and quantization"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        if not isinstance(raw, str):
            return raw
        name, _, rest = raw.partition(":")
        return {"format": name, **({"config" if name == "olive" else "quantization": rest} if rest else {})}

    @model_validator(mode="after")
    def _makes_sense(self) -> FormatConfig:
        if (self.format == "olive") != (self.config is not None):
            raise ValueError(
                "compress.formats: olive needs its configuration file as config"
                if self.config is None
                else f"compress.formats: config is for olive, and the format is {self.format}"
            )
        known = QUANTIZATIONS[self.format]
        if self.quantization is not None and self.quantization not in known:
            choice = f"one of {', '.join(known)}" if known else "set in Olive's own configuration"
            raise ValueError(
                f"compress.formats: {self.quantization!r} is no quantization of {self.format}; it is {choice}"
            )
        return self

    @property
    def stored_as(self) -> str:
        """The quantization, the default filled in; empty for Olive, whose passes decide."""
        return self.quantization or DEFAULT_QUANTIZATIONS.get(self.format, "")

    @property
    def variant(self) -> str:
        """The variant's name: ``gguf-q4_k_m``, or ``olive-`` and its file's name."""
        detail = Path(self.config).stem.lower().replace(" ", "-") if self.config else self.stored_as
        return self.name or f"{self.format}-{detail}"


class SparsityConfig(Section):
    """Which weights become zero. What runs a model here computes zeros like other numbers: neither time nor memory
    falls. The file gets smaller where it is compressed, and other hardware may skip them."""

    method: Literal["wanda", "sparsegpt", "magnitude"] = Field(
        "sparsegpt",
        description="wanda: weights by their inputs' size (Sun et al. 2023); sparsegpt: the others make up for those "
        "that go (Frantar and Alistarh 2023); magnitude: by size alone",
    )
    share: Share = 0.5
    pattern: Literal["free", "2:4"] = Field("free", description="2:4: two of every four neighbours, share 0.5")

    @model_validator(mode="after")
    def _check_pattern(self) -> SparsityConfig:
        if self.pattern == "2:4" and self.share != 0.5:
            raise ValueError(f"compress.prune.sparsity.share is {self.share:g}, and two of four are 0.5")
        return self


class RecoverConfig(Section):
    """Training after pruning, by the model before it (open tasks), or by what the student learnt from (closed ones)."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    losses: LossWeights | None = Field(
        None, description="null: closed label sets as distill.losses; open tasks {gold: 0.5, forward_kl: 1}"
    )

    @model_validator(mode="after")
    def _check_losses(self) -> RecoverConfig:
        for name in ("attention", "uld"):
            if self.losses is not None and getattr(self.losses, name):
                raise ValueError(
                    f"compress.prune.recover.losses.{name} is set, and recovery learns by gold, forward_kl, reverse_kl "
                    "and jsd"
                )
        return self


class PruneConfig(Section):
    """What is removed from the student before it is converted. Shares are of what is there: 0.25 removes a quarter."""

    of: Literal["student", "teacher"] = Field(
        "student", description="teacher: the local teacher itself is pruned, and no student is trained"
    )
    depth: Share = Field(0.0, description="share of the layers")
    depth_by: Literal["divergence", "influence", "evenly"] = Field(
        "divergence",
        description="which layers go: those without which the answers stay most alike, those that change least of "
        "what goes through them, or every k-th",
    )
    heads: Share = Field(0.0, description="share of the attention heads; groups of them stay even")
    channels: Share = Field(0.0, description="share of the feed-forward's channels")
    hidden: Share = Field(0.0, description="share of the hidden size")
    parameters: Share | None = Field(
        None, description="share of all parameters; which layers, heads, channels and dimensions is measured"
    )
    by: Literal["depth", "width", "both"] = Field("both", description="with parameters: what may go")
    vocabulary: Literal["keep", "trim"] = Field(
        "keep", description="trim: only the tokens of the training texts, their parts, and all bytes"
    )
    common_merges: Annotated[int, Field(ge=0)] = Field(
        0, description="with trim: so many of the tokenizer's commonest merges stay besides"
    )
    sparsity: SparsityConfig | None = None
    rows: Annotated[int, Field(gt=0)] = Field(128, description="training rows that parts are weighed on")
    recover: RecoverConfig | None = Field(RecoverConfig(), description="null: no training after pruning")

    @model_validator(mode="after")
    def _check_what(self) -> PruneConfig:
        shares = {name: getattr(self, name) for name in ("depth", "heads", "channels", "hidden")}
        given = [name for name, share in shares.items() if share]
        if self.parameters is not None and given:
            raise ValueError(
                f"compress.prune has parameters and {given[0]}: the one chooses the other; leave one of them out"
            )
        if self.common_merges and self.vocabulary == "keep":
            raise ValueError("compress.prune.common_merges goes with vocabulary: trim, and vocabulary is keep")
        return self

    @property
    def removes(self) -> bool:
        """Whether anything goes."""
        shares = (self.depth, self.heads, self.channels, self.hidden, self.parameters)
        return any(shares) or self.vocabulary == "trim" or self.sparsity is not None


class CalibrationConfig(Section):
    """Rows by which what goes through a model's matrices is measured."""

    data: str | None = Field(
        None, description="jsonl: {messages, target} or {text}; null: the training rows, drawn evenly with the seed"
    )
    rows: Annotated[int, Field(gt=0)] = 128


QuantizeAlgorithm = Literal["rtn", "k_quant", "hqq", "gptq", "awq"]
CALIBRATED: frozenset[str] = frozenset({"gptq", "awq"})
"""Algorithms that look at rows of the task."""


class QuantizeConfig(Section):
    """One more variant of the student, its weights in few bits by an algorithm of choice."""

    bits: Literal[4, 8] = 4
    algorithm: QuantizeAlgorithm = Field(
        "gptq",
        description="rtn: to the nearest; k_quant: scales searched; hqq: zeros searched; gptq: errors made up for; "
        "awq: channels scaled before",
    )
    block_size: Literal[16, 32, 64, 128] = Field(32, description="weights to a scale")
    symmetric: bool = Field(True, description="false: each block has a zero of its own (half a byte more)")
    activations: Literal["blocks", "dynamic", "static"] = Field(
        "blocks",
        description="what is multiplied: blocks: in 8 bits inside the kernels; with bits 8 also dynamic: one scale a "
        "tensor, found as it comes; static: one scale found on the calibration rows",
    )
    size_mb: Annotated[float, Field(gt=0)] | None = Field(
        None, description="mixed: the matrices whose rounding costs most, measured, get 8 bits as long as all fits"
    )
    recover: RecoverConfig | None = Field(
        None, description="train on the grid beside the model before (open tasks); {} for the defaults; null: not"
    )
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")] | None = Field(
        None, description="of the variant; null: made of the keys above"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        return {"algorithm": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _makes_sense(self) -> QuantizeConfig:
        if self.activations != "blocks" and (self.bits, self.algorithm) != (8, "rtn"):
            raise ValueError(
                f"compress.quantize: activations: {self.activations} goes with bits: 8 and algorithm: rtn, and these "
                f"are {self.bits} and {self.algorithm}"
            )
        if self.activations != "blocks" and self.recover is not None:
            raise ValueError("compress.quantize: recover trains on a grid of weights; leave activations out")
        if self.algorithm == "hqq" and self.symmetric:
            if "symmetric" in self.model_fields_set:
                raise ValueError("compress.quantize: hqq finds a zero for each block, so symmetric is false with it")
            object.__setattr__(self, "symmetric", False)
        if self.size_mb is not None and self.bits == 8:
            raise ValueError(
                "compress.quantize: size_mb gives some matrices 8 bits instead of 4, and bits is 8 already"
            )
        if self.recover is not None and (not self.symmetric or self.algorithm != "rtn" or self.size_mb is not None):
            raise ValueError(
                "compress.quantize: recover trains on the symmetric grid of algorithm: rtn, all matrices in the "
                "same bits"
            )
        return self

    @property
    def variant(self) -> str:
        """The variant's name: ``int4-gptq``, ``int4-awq-64-asymmetric-mixed`` …"""
        details = [f"int{self.bits}", self.algorithm]
        details += [str(self.block_size)] if self.block_size != 32 else []
        details += ["asymmetric"] if not self.symmetric and self.algorithm != "hqq" else []
        details += [self.activations] if self.activations != "blocks" else []
        details += ["mixed"] if self.size_mb is not None else []
        details += ["recovered"] if self.recover is not None else []
        return self.name or "-".join(details)

    @property
    def calibrated(self) -> bool:
        """Whether rows are looked at."""
        return self.algorithm in CALIBRATED or self.activations == "static" or self.size_mb is not None


class CompressConfig(Section):
    """Which variants are made and measured, and which one may go into the bundle."""

    prune: PruneConfig | None = Field(None, description="what is removed first; null: nothing")
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32", "fp16", "int8", "int4")
    teacher_precisions: tuple[Precision, ...] = Field(
        ("int8", "int4"), description="quantized forms of a local teacher to compare with"
    )
    choose: str = Field(
        "auto", description="a precision, the name of a format's variant, or auto: the smallest that passes"
    )
    formats: tuple[FormatConfig, ...] = Field(
        (), description="variants for other engines: gguf:q4_k_m, openvino:int8 …"
    )
    embeddings: bool = Field(
        False, description="open tasks: ONNX graphs also give their hidden states, for /v1/embeddings"
    )
    quantize: tuple[QuantizeConfig, ...] = Field(
        (), description="variants in few bits by other algorithms: gptq, awq, hqq, k_quant, rtn, or sections"
    )
    calibration: CalibrationConfig = CalibrationConfig()

    @field_validator("formats", "quantize", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping | FormatConfig | QuantizeConfig) else value

    @model_validator(mode="after")
    def _own_names(self) -> CompressConfig:
        names = list(self.variants)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"compress makes two variants named {twice[0]}: give one of them another name")
        return self

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of all forms of the student, as ``choose`` takes them."""
        return (*self.precisions, *(one.variant for one in self.formats), *(one.variant for one in self.quantize))
