"""Every architecture through onnxruntime-genai's builder and as OpenVINO's representation, against torch.

The children are run in this process: half a second each, where starting them takes four.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.children import children_here
from fakes.tiny_models import write_tiny_llama, write_tiny_model
from slmops.artifacts import Message, Variant, drafting
from slmops.artifacts.base import Draft
from slmops.compress import export_generator, generator, openvino_export
from slmops.compress.child import run_child
from slmops.compress.openvino_export import context_tokens, export_openvino
from slmops.compress.sound import shape_problem
from slmops.errors import ConversionError, CorruptArtifactError, ModelError, StorageError
from slmops.runtime import GenerationRequest, open_generator
from slmops.runtime.openvino import OpenvinoGenerator

ABOUT: dict[str, Any] = {"task": "conversation", "name": "tiny", "max_tokens": 256, "system": None}
CONVERSATIONS = [
    ((Message("user", "hello"),), "how are you today?"),
    ((Message("user", "my card is lost"),), "refund"),
    ((Message("system", "Be brief."), Message("user", "ü€😀 12 345")), "the balance of my account"),
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1 + i / 20 for i in range(24)],
    "long_factor": [2.0 + i for i in range(24)],
    "original_max_position_embeddings": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2, an odd number of heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {"layers": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3, a window of 16 tokens": ("phi3", {}),
    "phi4": ("phi4", WIDE),
    "phi4 of long contexts": ("phi4", {**WIDE, "rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "gemma3, a window of 16 tokens": ("gemma3", {"layers": 6}),
    "gemma3 with stretched positions": (
        "gemma3",
        {
            "layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "llama with stretched positions": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
}
Export = Callable[[Path, Draft], None]


def by_builder(checkpoint: Path, draft: Draft) -> None:
    export_generator(checkpoint, draft, precision="fp32", **ABOUT)


def by_openvino(checkpoint: Path, draft: Draft) -> None:
    export_openvino(checkpoint, draft, precision="fp32", **ABOUT)


def needs_openvino() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slmops[openvino]'")


@pytest.fixture
def here() -> Iterator[None]:
    with children_here():
        yield


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("export", [by_builder, by_openvino])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_answers_as_torch_does(name: str, export: Export, tmp_path: Path) -> None:
    if export is by_openvino:
        needs_openvino()
    family, changes = MODELS[name]
    write_tiny_model(tmp_path / "checkpoint", family, **changes)
    with drafting("variant", tmp_path / "variant") as draft:
        export(tmp_path / "checkpoint", draft)
    folder = Variant.open(tmp_path / "variant").model_path
    torch, engine = open_generator(tmp_path / "checkpoint", threads=1), open_generator(folder, threads=1)
    ours, theirs = (np.array([one.logprob for one in model.score(CONVERSATIONS)]) for model in (engine, torch))
    assert np.abs(ours - theirs).max() < 5e-3
    for messages, _ in CONVERSATIONS:
        request = GenerationRequest(messages, max_tokens=12)
        given, expected = engine.generate([request])[0], torch.generate([request])[0]
        assert (given.text, given.completion_tokens) == (expected.text, expected.completion_tokens)
    engine.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def variants(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    needs_openvino()
    root, found = tmp_path_factory.mktemp("openvino"), {}
    with children_here():
        for precision in ("fp32", "fp16", "int8", "int4"):
            if precision == "int8":
                pytest.importorskip("nncf")
            with drafting("variant", root / precision) as draft:
                export_openvino(llama, draft, precision=precision, **ABOUT)  # type: ignore[arg-type]
            found[precision] = Variant.open(root / precision).model_path
    return found


def test_fewer_bits_are_smaller_and_further_away(variants: dict[str, Path], llama: Path) -> None:
    sizes = [(folder / "openvino_model.bin").stat().st_size for folder in variants.values()]
    assert sizes == sorted(sizes, reverse=True)
    reference = np.array([one.logprob for one in open_generator(llama, threads=1).score(CONVERSATIONS)])
    away = {
        name: float(
            np.abs([one.logprob for one in open_generator(folder, threads=1).score(CONVERSATIONS)] - reference).max()
        )
        for name, folder in variants.items()
    }
    assert away["fp32"] < 1e-3
    assert away["fp16"] < 0.1
    assert away["int8"] < 3 < away["int4"] + 3 < 30


def test_the_runtime_streams_samples_stops_and_counts(variants: dict[str, Path]) -> None:
    model = open_generator(variants["fp32"], threads=1)
    assert isinstance(model, OpenvinoGenerator)
    request = GenerationRequest(CONVERSATIONS[0][0], max_tokens=12)
    whole = model.generate([request])[0]
    pieces = list(model.stream(request))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert whole.prompt_tokens == model.count_tokens(CONVERSATIONS[0][0])
    sampled = GenerationRequest(CONVERSATIONS[0][0], max_tokens=8, temperature=1.5, seed=3)
    assert model.generate([sampled])[0].text == model.generate([sampled])[0].text
    rows = model.target_logits(*CONVERSATIONS[1]).astype(np.float64)
    peak = rows.max(axis=1, keepdims=True)
    total = (peak[:, 0] + np.log(np.exp(rows - peak).sum(axis=1))).shape
    assert total == (model.score([CONVERSATIONS[1]])[0].tokens,)


def test_openvino_genai_runs_the_same_folder(variants: dict[str, Path]) -> None:
    genai = pytest.importorskip("openvino_genai")
    pytest.importorskip("openvino_tokenizers")
    from slmops.chat import ChatTokenizer

    folder = variants["fp32"]
    prompt = ChatTokenizer.load(folder).render(CONVERSATIONS[1][0], add_generation_prompt=True)
    pipeline = genai.LLMPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample, settings.apply_chat_template = 12, False, False
    theirs = pipeline.generate(prompt, settings)
    ours = open_generator(folder, threads=1).generate([GenerationRequest(CONVERSATIONS[1][0], max_tokens=12)])[0].text
    assert str(theirs).encode("utf-8", "replace")[:6] == ours.encode("utf-8", "replace")[:6]


def test_importing_openvino_leaves_its_telemetry_out() -> None:
    needs_openvino()
    code = (
        "import sys\nfrom slmops.runtime.openvino import import_openvino\nimport_openvino()\n"
        "import openvino.tools.ovc.telemetry_utils as u\n"
        "print(sys.modules['openvino_telemetry'], u.tm.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None openvino.tools.ovc.telemetry_stub"


def test_a_damaged_folder_is_told(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variants["int8"], tmp_path / "model"))
    (folder / "openvino_model.xml").write_text("<net", "utf-8")
    with pytest.raises(CorruptArtifactError, match="cannot be loaded"):
        open_generator(folder)
    (folder / "openvino_model.bin").unlink()
    with pytest.raises(CorruptArtifactError, match=r"openvino_model\.bin is missing"):
        open_generator(folder)


# --- what is refused, whatever the format ---------------------------------------------------------------------------


def draft_in(folder: Path) -> Draft:
    for name in ("draft", "work"):
        (folder / name).mkdir()
    return Draft(folder / "draft", folder / "work")


@pytest.fixture
def own_llama(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


@pytest.mark.parametrize("export", [by_builder, by_openvino])
def test_bad_checkpoints_are_refused_before_the_work(own_llama: Path, tmp_path: Path, export: Export) -> None:
    from safetensors.numpy import load_file, save_file

    if export is by_openvino:
        needs_openvino()
    draft = draft_in(tmp_path)
    template = (own_llama / "chat_template.jinja").read_text("utf-8")
    (own_llama / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        export(own_llama, draft)
    (own_llama / "chat_template.jinja").write_text(template, "utf-8")
    rewrite(own_llama / "config.json", num_key_value_heads=3)
    with pytest.raises(ConversionError, match="4 heads of queries cannot share 3"):
        export(own_llama, draft)
    rewrite(own_llama / "config.json", num_key_value_heads=2)
    weights = load_file(own_llama / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = np.inf
    save_file(weights, own_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight .* not finite"):
        export(own_llama, draft)
    (own_llama / "labels.json").write_text("[]", "utf-8")
    with pytest.raises(ModelError, match="is a classifier"):
        export(own_llama, draft)


def test_a_type_that_openvino_is_not_given(own_llama: Path, tmp_path: Path) -> None:
    rewrite(own_llama / "config.json", model_type="mamba")
    with pytest.raises(ConversionError, match=r"'mamba'.*known: gemma3_text"):
        by_openvino(own_llama, draft_in(tmp_path))


@pytest.mark.parametrize("module", [generator, openvino_export])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    """The child writes half a model, says what it met, and fails."""
    if module is openvino_export:
        needs_openvino()
    script = tmp_path / "child"
    script.write_text(
        "#!/bin/sh\nmkdir half; echo x > half/model.onnx; echo 'OSError: [Errno 28] No space left'; exit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(StorageError, match="No space left"), drafting("variant", tmp_path / "variant") as draft:
        (by_builder if module is generator else by_openvino)(llama, draft)
    assert not (tmp_path / "variant").exists()
    assert not list(tmp_path.glob(".variant.*.tmp"))


def test_a_child_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConversionError, match=r"The work ended with exit code 3: one / two Do less\. The whole log"):
        run_child(
            ["-c", "import sys; print('one'); print('two'); sys.exit(3)"],
            tmp_path / "log",
            what="The work",
            remedy="Do less.",
        )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}, None),
        ({"num_attention_heads": 3, "num_key_value_heads": 2, "hidden_size": 96}, "3 heads of queries cannot share 2"),
        ({"num_attention_heads": 3, "hidden_size": 64}, "cannot be divided among 3 heads"),
        ({"num_attention_heads": 4, "hidden_size": 60}, "15 numbers"),
        ({"num_attention_heads": 4, "hidden_size": 60, "head_dim": 16}, None),
        ({"hidden_size": 60}, None),
    ],
)
def test_shapes_of_heads(config: dict[str, Any], problem: str | None) -> None:
    found = shape_problem(config)
    assert found is None if problem is None else problem in str(found)


def test_openvino_keeps_to_the_rotary_factors_that_it_was_traced_with() -> None:
    config = {"max_position_embeddings": 4096, "original_max_position_embeddings": 1024}
    assert context_tokens(config) == 4096
    assert context_tokens({**config, "rope_parameters": {"rope_type": "longrope"}}) == 1024
