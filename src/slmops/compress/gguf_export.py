"""A language model's checkpoint as a GGUF file for llama.cpp and Ollama, at one quantization.

Guarantees: the file is whole or absent; it holds the architecture's keys, the tokenizer (refused where llama.cpp would
cut text otherwise) and the chat template; tensors are read, converted and written one at a time, so memory holds the
largest of them and not the model; the same checkpoint gives the same bytes. Into a draft go also our own tokenizer and
description, and an Ollama ``Modelfile``; what was written there was loaded and gave a finite answer.
Not covered: adapters, vision parts, mixtures of experts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Draft, Message
from slmops.artifacts.base import is_storage_trouble
from slmops.chat import ChatTokenizer
from slmops.compress.folder import (
    TRIAL_TEXT,
    check_answers,
    copy_tokenizer,
    count_parameters,
    model_folder,
    pad_token_id,
    write_description,
)
from slmops.compress.gguf_architectures import (
    context_tokens,
    extra_tensors,
    find_architecture,
    placed,
    write_configuration,
)
from slmops.compress.gguf_tokenizer import PROBE, write_tokenizer
from slmops.compress.gguf_types import (
    FILE_TYPES,
    check_kernels,
    check_quantization,
    quantize,
    tensor_type,
)
from slmops.compress.modelfile import modelfile
from slmops.compress.sound import check_language_model, not_finite
from slmops.compress.template import check_template
from slmops.errors import ConversionError, MissingExtraError, StorageError
from slmops.models.folder import read_tensors, weight_files
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import GgufQuantization

if TYPE_CHECKING:
    from slmops.runtime.gguf import GgufGenerator

GGUF_NAME = "model.gguf"
MODELFILE = "Modelfile"
TOKENIZER_FILES = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json")
TRIAL_TOKENS = 4

Array = NDArray[Any]


def export_gguf(
    checkpoint_folder: Path,
    destination: Path | Draft,
    *,
    quantization: GgufQuantization = "q8_0",
    task: str = "conversation",
    name: str = "",
    max_tokens: int | None = None,
    system: str | None = None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    progress: ProgressSink = ignore,
) -> Path:
    """Write the model at ``checkpoint_folder`` (transformers, safetensors) as GGUF; the file's path.

    ``destination``: the file to write (a ``<file's stem>.Modelfile`` is put beside it), or a draft, which becomes a
    variant for ``llama.cpp``. ``max_tokens``: of prompt and answer, for the Modelfile; None: the model's context.
    ``importance``: tensor's name in the checkpoint to mean squares of its input's columns, ``[columns]`` (llama.cpp's
    importance matrix), heeded by the types that can.

    Raises:
        UsageError: an unknown quantization.
        ModelError: no language model with a chat template there.
        MissingExtraError: gguf or torch is not installed; xllamacpp, where the quantization or the check needs it.
        ConversionError: an architecture or a tokenizer that llama.cpp would run otherwise, weights that are not
            finite, or a file that does not answer.
        StorageError: the disk would not take the file (a draft leaves that to the stage).
    """
    check_quantization(quantization)
    config = check_language_model(checkpoint_folder)
    find_architecture(config, checkpoint_folder)
    context = min(max_tokens or context_tokens(config), context_tokens(config))
    chat = ChatTokenizer.load(checkpoint_folder)
    check_template(chat, checkpoint_folder)
    if isinstance(destination, Path):
        try:
            _write_whole(checkpoint_folder, destination, config, quantization, name, importance, progress)
            _write_modelfile(destination, f"{destination.stem}.{MODELFILE}", chat, context, system)
        except OSError as error:
            if is_storage_trouble(error):
                raise StorageError.from_os_error(error, "write", destination) from error
            raise
        return destination
    folder = model_folder(destination)
    path = folder / GGUF_NAME
    _write_whole(checkpoint_folder, path, config, quantization, name, importance, progress)
    _write_modelfile(path, MODELFILE, chat, context, system)
    copy_tokenizer(checkpoint_folder, folder)
    for file in TOKENIZER_FILES:
        if (checkpoint_folder / file).is_file():
            shutil.copyfile(checkpoint_folder / file, folder / file)
    parameters = count_parameters(checkpoint_folder)
    write_description(
        folder,
        runtime="llama.cpp",
        form="generator",
        precision=quantization,
        parameters=parameters,
        labels=None,
        max_tokens=context,
        task=task,
        name=name,
        system=system,
        pad_token_id=pad_token_id(config),
    )
    what, remedy = f"Writing the {quantization} GGUF file", "Use another quantization, or the format onnx."
    check_answers(what, remedy, lambda: _ask(folder))
    destination.metrics |= {"precision": quantization, "parameters": parameters}
    return path


def _ask(folder: Path) -> float:
    from slmops.runtime.base import GenerationRequest
    from slmops.runtime.gguf import GgufGenerator

    generator = GgufGenerator.load(folder, threads=1)
    try:
        _check_tokens(ChatTokenizer.load(folder), generator)
        question = (Message("user", TRIAL_TEXT),)
        generator.generate([GenerationRequest(question, max_tokens=TRIAL_TOKENS)])
        return generator.score([(question, "ok")])[0].logprob
    finally:
        generator.close()


def _check_tokens(chat: ChatTokenizer, generator: GgufGenerator) -> None:
    """Raises :class:`ConversionError` where llama.cpp reads text otherwise than the model was taught. Text is given in
    Unicode's composed form: llama.cpp composes nothing, and several tokenizers do."""
    for text in (TRIAL_TEXT, normalize("NFC", PROBE)):
        ours, theirs = chat.encode(text, add_special_tokens=False), generator.engine_tokens(text)
        if ours != theirs:
            where = next(
                (number for number, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(ours), len(theirs)),
            )
            raise ConversionError(
                f"llama.cpp's tokenizer makes other tokens of a text than the model's own, from token {where} on.",
                remedy="Use the format onnx or openvino for this model.",
            )


def _write_whole(
    checkpoint: Path,
    path: Path,
    config: Mapping[str, Any],
    quantization: GgufQuantization,
    name: str,
    importance: Mapping[str, NDArray[np.float32]] | None,
    progress: ProgressSink,
) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write(checkpoint, temporary, config, quantization, name or path.stem, importance or {}, progress)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(
    checkpoint: Path,
    path: Path,
    config: Mapping[str, Any],
    quantization: GgufQuantization,
    name: str,
    importance: Mapping[str, NDArray[np.float32]],
    progress: ProgressSink,
) -> None:
    try:
        import gguf
        import torch  # noqa: F401 (bfloat16 weights are read through it)
    except ImportError:
        raise MissingExtraError("Writing a GGUF file", "train") from None
    architecture = find_architecture(config, checkpoint)
    place = placed(architecture, config)
    found = [tensor for file in weight_files(checkpoint) for tensor in read_tensors(file)]
    sources = {tensor.name: tensor for tensor in found}
    plan: list[tuple[str, tuple[int, ...], str, Callable[[], Array]]] = []
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    target = {source: placing for source in sources if (placing := place(source)) is not None}
    tied = "output.weight" not in {placing[0] for placing in target.values()}
    grouped = heads // int(config.get("num_key_value_heads") or heads)

    def reader(source: str, change: Callable[[Array], Array]) -> Callable[[], Array]:
        return lambda: change(_read(sources[source].path, source))

    for key, values in extra_tensors(config).items():
        plan.append((key, values.shape, "F32", lambda values=values: values))  # type: ignore[misc]
    for source, (key, change) in target.items():
        kind = tensor_type(key, sources[source].shape, quantization, layers=layers, tied=tied, grouped=grouped)
        plan.append((key, sources[source].shape, kind, reader(source, change)))
    check_kernels([kind for _, _, kind, _ in plan])
    weights = {placing[0]: importance[source] for source, placing in target.items() if source in importance}
    rows = next(shape[0] for key, shape, _, _ in plan if key == "token_embd.weight")
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[quantization])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(rows)
        write_configuration(writer, config)
        write_tokenizer(writer, checkpoint, rows)
        for key, shape, kind, _ in plan:
            numbered = gguf.GGMLQuantizationType[kind]
            bytes_shape = gguf.quants.quant_shape_to_byte_shape(shape, numbered)
            size = int(np.prod(bytes_shape))
            writer.add_tensor_info(key, bytes_shape, np.dtype(np.uint8), size, raw_dtype=numbered)
        _check_room(path, sum(int(np.prod(_bytes(shape, kind))) for _, shape, kind, _ in plan))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (key, _, kind, read) in enumerate(plan):
            progress(Progress(f"compress gguf {quantization}", done, len(plan), "tensors", key))
            values = read()
            if not np.isfinite(values).all():
                raise not_finite(key, checkpoint)
            writer.write_tensor_data(quantize(values, kind, weights.get(key)))
        progress(Progress(f"compress gguf {quantization}", len(plan), len(plan), "tensors"))
    finally:
        writer.close()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    import gguf

    made: tuple[int, ...] = gguf.quants.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[kind])
    return made


def _check_room(path: Path, size_bytes: int) -> None:
    """Before minutes of work: a disk that is too small is known now. It may fill up in the middle all the same."""
    free = shutil.disk_usage(path.parent).free
    if size_bytes > free:
        raise StorageError(
            f"{path.name.removeprefix('.').removesuffix('.tmp')} takes {size_bytes / 1e6:,.1f} MB, and {path.parent} "
            f"has {free / 1e6:,.1f} MB left.",
            remedy="Free some space or choose another place.",
        )


def _read(path: Path, name: str) -> NDArray[np.float32]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        values: NDArray[np.float32] = file.get_tensor(name).float().numpy()
    return values


def _write_modelfile(gguf: Path, name: str, chat: ChatTokenizer, context: int, system: str | None) -> None:
    stops = [text for token in chat.eos_token_ids if (text := chat.decode([token], skip_special_tokens=False))]
    text = modelfile(chat, gguf.name, context_tokens=context, system=system, stops=stops)
    (gguf.parent / name).write_text(text, "utf-8")
