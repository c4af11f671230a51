"""From a GGUF file to a folder that transformers can load, in fp32.

Guarantees: the checkpoint is whole or absent, made once for a file's contents (two processes at once make it once),
and has the file's tokenizer, chat template, end token and context length.
Not covered: quality. What a 4-bit file has lost stays lost.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slmops.errors import ConversionError, MemoryBudgetError, ModelError
from slmops.models.cache import cached_digests, changed_file, locked, model_files, read_json, staged, write_json
from slmops.models.folder import check_model_folder
from slmops.models.gguf_file import check_gguf
from slmops.models.memory import available_memory_bytes, format_bytes
from slmops.progress import Progress, ProgressSink, ignore
from slmops.trust import digest_file

CONVERTER_VERSION = 1
"""Part of a converted folder's name: raise it when the conversion writes something else than before."""
_CONVERSION_BYTES = 8  # for each parameter: the unpacked tensors and the model that they are copied into, in fp32
_LOADER_NOISE = ("is_local", "local_files_only")

logger = logging.getLogger(__name__)


def checkpoint_of_gguf(gguf: Path, root: Path, *, progress: ProgressSink = ignore) -> tuple[Path, str | None]:
    """The converted folder of ``gguf`` under the cache ``root``, and the licence that the file states.

    Made at the first call, found at the next.

    Raises:
        ModelError: not a GGUF file, cut short, or of an architecture that transformers cannot read.
        MemoryBudgetError: the weights in fp32 would not fit.
        ConversionError: the conversion ended without a model.
        StorageError: the disk would not take it.
    """
    check_gguf(gguf)
    sha256 = cached_digests({gguf.name: gguf}, root)[gguf.name].sha256
    folder = root / "checkpoints" / f"gguf-{sha256[:16]}-{CONVERTER_VERSION}"
    record_path = folder.with_suffix(".json")
    with locked(folder.with_suffix(".lock")):
        if folder.is_dir() and (record := read_json(record_path)):
            changed = changed_file(folder, record["files"], root)
            if changed is None:
                return folder, record["license"]
            logger.warning("%s has changed since it was written; it is converted again.", folder / changed)
        with staged(folder) as draft:
            license_name = convert_gguf(gguf, draft, progress=progress)
            files = {name: digest_file(path).sha256 for name, path in model_files(draft).items()}
            write_json(record_path, {"gguf": str(gguf), "sha256": sha256, "license": license_name, "files": files})
    return folder, license_name


def convert_gguf(gguf: Path, destination: Path, *, progress: ProgressSink = ignore) -> str | None:
    """Write the model in ``gguf`` to the directory ``destination`` as fp32 safetensors with its tokenizer.

    Returns the licence that the file states. Raises as :func:`checkpoint_of_gguf` does.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(
            f"{gguf} is damaged or cut short: {_first_line(error)}.", remedy="Fetch the file again."
        ) from error
    _check_memory(gguf, sum(int(tensor.n_elements) for tensor in reader.tensors))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet_transformers(gguf.stem, progress), _read_once(gguf, reader):
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"transformers cannot read {gguf.name}: {_first_line(error)}.",
                remedy="Name the model it was made from (hf:OWNER/NAME or a folder with safetensors).",
            ) from error
        _forget_quantization(model)
        _agree_on_tokens(model, tokenizer, _text_field(reader, "tokenizer.ggml.pre"))
        model.save_pretrained(destination)
        tokenizer.save_pretrained(destination)
    _drop_loader_noise(destination / "tokenizer_config.json")
    for path in sorted(gguf.parent.glob("LICENSE*")):
        shutil.copyfile(path, destination / path.name)
    try:
        check_model_folder(destination)
    except ModelError as error:
        raise ConversionError(
            f"The conversion of {gguf.name} wrote no usable model: {error.message}", remedy=error.remedy
        ) from error
    return _text_field(reader, "general.license")


def _text_field(reader: Any, name: str) -> str | None:
    field = reader.fields.get(name)
    return str(field.contents()) if field is not None else None


def _check_memory(gguf: Path, parameters: int) -> None:
    needed_bytes, available_bytes = parameters * _CONVERSION_BYTES, available_memory_bytes()
    if available_bytes is not None and needed_bytes > available_bytes:
        raise MemoryBudgetError(
            f"Converting {gguf.name} takes {parameters / 1e6:,.1f} M parameters × {_CONVERSION_BYTES} bytes = "
            f"{format_bytes(needed_bytes)}, and {format_bytes(available_bytes)} are free.",
            remedy="Use a smaller model, or free some memory.",
        )


def _forget_quantization(model: Any) -> None:
    """The weights are plain fp32 now; transformers still remembers the file and would refuse to save them."""
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _agree_on_tokens(model: Any, tokenizer: Any, pre_tokenizer: str | None) -> None:
    """Make config, generation config and tokenizer name the same end and padding, and restore what GGUF only names."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    if pre_tokenizer == "smollm":
        from tokenizers import pre_tokenizers

        # SmolLM was trained with every digit on its own. transformers leaves that out, which shows after two spaces.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _drop_loader_noise(path: Path) -> None:
    """Remove from the tokenizer's config how it happened to be loaded here."""
    config = json.loads(path.read_text("utf-8"))
    kept = {name: value for name, value in config.items() if name not in _LOADER_NOISE}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def _quiet_transformers(name: str, progress: ProgressSink) -> Iterator[None]:
    """No bars on the terminal while transformers works: its tensors become progress events.

    The reader of GGUF files draws with tqdm directly and knows no switch, so its name for tqdm is lent out.
    """
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as transformers_logging

    def report(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        counted = list(items)
        for done, item in enumerate(counted, start=1):
            yield item
            progress(Progress(f"convert {name}", done, len(counted), "tensors"))

    shown = transformers_logging.is_progress_bar_enabled()
    drawn = getattr(reader, "tqdm", None)
    transformers_logging.disable_progress_bar()
    if drawn is not None:
        reader.tqdm = report
    try:
        yield
    finally:
        if drawn is not None:
            reader.tqdm = drawn
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _read_once(gguf: Path, reader: Any) -> Iterator[None]:
    """Lend ``reader`` to transformers, which would parse the same file three times (seconds each: a vocabulary)."""
    import gguf as library

    original = library.GGUFReader

    def lent(path: Any, *args: Any) -> Any:
        return reader if Path(path) == gguf else original(path, *args)

    library.GGUFReader = lent
    try:
        yield
    finally:
        library.GGUFReader = original


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
