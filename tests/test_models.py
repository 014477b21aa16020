"""A model loads the same by every road: residual streams, tokens and hook names agree."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from sae_lens import HookedSAETransformer
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_route import models
from sae_lens_route.models import (
    DEMO_FOLDER,
    MODEL_CLASS_NAMES,
    d_model,
    decoder_blocks,
    default_routed_layers,
    load_model,
    n_layers,
    residual_hook_names,
)

TINYLLAMA = Path(__file__).parent / "golden" / "tinyllama"

needs_bridge = pytest.mark.skipif(
    not has_transformer_bridge(), reason="TransformerBridge came with TransformerLens 3"
)
needs_demo = pytest.mark.skipif(
    not (DEMO_FOLDER / "config.json").is_file(), reason="the demo model is not built yet"
)
KINDS = [
    pytest.param(name, marks=needs_bridge if name == "TransformerBridge" else ())
    for name in MODEL_CLASS_NAMES
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def residual_streams(model: Any, tokens: Tensor) -> Tensor:
    """`[layers, batch, pos, d]`, read through the model's own hooks."""
    names = residual_hook_names(model, range(n_layers(model)))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name] for name in names])


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def hugging_face_streams(folder: Path, tokens: Tensor, blocks: str) -> Tensor:
    """The same from the plain Hugging Face model; `blocks` is the path of its list of blocks."""
    hf_model = AutoModelForCausalLM.from_pretrained(
        str(folder), attn_implementation="eager", **{models._DTYPE_KEYWORD: torch.float32}
    )
    found: list[Tensor] = []

    for block in hf_model.get_submodule(blocks).children():
        block.register_forward_hook(lambda _m, _i, output: found.append(first(output)))
    with torch.no_grad():
        hf_model(tokens)
    return torch.stack(found)


def assert_same_streams(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Equal in every block, up to `tolerance` of that block's standard deviation."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().amax((1, 2, 3)) / theirs.std((1, 2, 3))
    assert error.max() <= tolerance, error


def random_tokens(n: int, n_tokens: int = 512) -> Tensor:
    return torch.randint(n_tokens, (2, n), generator=torch.Generator().manual_seed(1))


# --- the three kinds -----------------------------------------------------------------------------


@pytest.fixture(params=[TINYLLAMA, pytest.param("demo", marks=needs_demo)], ids=["tiny", "demo"])
def llama(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return str(request.param), DEMO_FOLDER if request.param == "demo" else request.param


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_residual_streams_of_the_hugging_face_model(
    llama: tuple[str, Path], kind: str
) -> None:
    name, folder = llama
    model = load_model(name, kind)
    tokens = random_tokens(48)
    theirs = hugging_face_streams(folder, tokens, "model.layers")
    assert_same_streams(residual_streams(model, tokens), theirs)
    assert {p.dtype for p in model.parameters()} <= {torch.float32}
    assert (n_layers(model), d_model(model)) == (16, theirs.shape[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_of_each_decoder_block_is_the_residual_stream(kind: str) -> None:
    model = load_model(str(TINYLLAMA), kind)
    seen: list[Tensor] = []
    for block in decoder_blocks(model):
        block.register_forward_hook(lambda _m, _i, output: seen.append(first(output)))
    streams = residual_streams(model, random_tokens(8))
    assert torch.equal(torch.stack(seen), streams)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_get_exactly_one_bos_or_none(llama: tuple[str, Path], kind: str) -> None:
    model: Any = load_model(llama[0], kind)
    plain = AutoTokenizer.from_pretrained(str(llama[1]))("x = 1", add_special_tokens=False)
    bos = model.tokenizer.bos_token_id
    if kind != "AutoModelForCausalLM":  # which only tokenizes as ActivationsStore asks it to
        assert model.to_tokens("x = 1").tolist() == [[bos, *plain["input_ids"]]]
        assert model.to_tokens("x = 1", prepend_bos=False).tolist() == [plain["input_ids"]]
    as_in_store = model.to_tokens(
        "x = 1", prepend_bos=False, truncate=False, move_to_device=False, padding_side=None
    )
    assert as_in_store.tolist() == [plain["input_ids"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bos", [True, False])
def test_a_tokenizer_that_does_not_prepend_bos_itself(
    tmp_path: Path, kind: str, has_bos: bool
) -> None:
    shutil.copytree(TINYLLAMA, tmp_path / "m")
    edit_json(tmp_path / "m" / "tokenizer.json", post_processor=None)
    if not has_bos:
        edit_json(tmp_path / "m" / "tokenizer_config.json", bos_token=None)
    model: Any = load_model(str(tmp_path / "m"), kind)
    plain = [89, 222, 30, 222, 18]
    as_in_store = {"truncate": False, "move_to_device": False, "padding_side": None}
    assert model.to_tokens("x = 1", prepend_bos=False, **as_in_store).tolist() == [plain]
    if kind != "AutoModelForCausalLM":
        expected = [0, *plain] if has_bos else plain
        assert model.to_tokens("x = 1").tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_is_the_one_asked_for_not_the_one_stored(tmp_path: Path, kind: str) -> None:
    hf_model: Any = AutoModelForCausalLM.from_pretrained(str(TINYLLAMA))
    hf_model.to(torch.bfloat16).save_pretrained(tmp_path)
    for file in TINYLLAMA.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    single = load_model(str(tmp_path), kind)
    assert residual_streams(single, random_tokens(8)).dtype == torch.float32
    half: Any = load_model(str(tmp_path), kind, dtype="bfloat16")
    assert residual_streams(half, random_tokens(8)).dtype == torch.bfloat16
    if kind == "HookedTransformer":
        assert half.cfg.dtype == torch.bfloat16


def test_classes_are_those_of_sae_lens() -> None:
    assert type(load_model(str(TINYLLAMA))) is HookedSAETransformer
    proxy = load_model(str(TINYLLAMA), "AutoModelForCausalLM", hook_names=["model.layers.3"])
    assert type(proxy) is HookedProxyLM
    assert list(proxy.hook_dict) == ["model.layers.3"]


@needs_bridge
def test_the_bridge_is_that_of_sae_lens() -> None:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    assert type(load_model(str(TINYLLAMA), "TransformerBridge")) is SAETransformerBridge


# --- conversion of a folder, family by family ----------------------------------------------------

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that 200 tokens show the scaling
}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2", {"n_inner": 40}, "transformer.h"),
    "gpt2-scaled": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "transformer.h"),
    "gpt_neox": ("GPTNeoX", {}, "gpt_neox.layers"),
    "gpt_neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}, "gpt_neox.layers"),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}, "model.layers"),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}, "model.layers"),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}, "model.layers"),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 16}, "model.layers"),
    "gemma2": (
        "Gemma2",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 7,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        "model.layers",
    ),
    "llama": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_theta": 500_000.0,
            "rope_scaling": LLAMA3_ROPE,
        },
        "model.layers",
    ),
}


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def small_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A small random model, its norms and biases away from their defaults."""
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    hf_model.save_pretrained(folder)
    for file in TINYLLAMA.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_folder_has_the_residual_streams_of_the_hugging_face_model(
    tmp_path: Path, family: str
) -> None:
    class_name, changes, blocks = FAMILIES[family]
    folder = small_folder(tmp_path / "m", class_name, **changes)
    tokens = random_tokens(200)
    theirs = hugging_face_streams(folder, tokens, blocks)
    assert_same_streams(residual_streams(load_model(str(folder)), tokens), theirs)
    proxy = load_model(str(folder), "AutoModelForCausalLM", attn_implementation="eager")
    assert residual_hook_names(proxy, [3, 1]) == [f"{blocks}.3", f"{blocks}.1"]
    assert_same_streams(residual_streams(proxy, tokens), theirs)


def test_words_in_the_path_do_not_decide_the_family(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "Llama-3.2-1B" / "gemma-2-2b", "GPT2")
    assert n_layers(load_model(str(folder))) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_rope_as_transformers_5_writes_it_is_read_by_transformers_4_too(
    tmp_path: Path, kind: str
) -> None:
    changes = FAMILIES["llama"][1]
    folder = small_folder(tmp_path / "m", "Llama", **changes)
    tokens = random_tokens(200)
    theirs = hugging_face_streams(folder, tokens, "model.layers")
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {**LLAMA3_ROPE, "rope_theta": changes["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_streams(residual_streams(load_model(str(folder), kind), tokens), theirs)


def test_a_long_context_is_cut_unless_asked_for(tmp_path: Path) -> None:
    folder = str(small_folder(tmp_path / "m", "Llama", max_position_embeddings=131_072))
    model: Any = load_model(folder)
    assert model.cfg.n_ctx == 2048
    longer: Any = load_model(folder, n_ctx=4096)
    assert longer.cfg.n_ctx == 4096


def test_options_of_sae_lens_and_transformer_lens_are_understood() -> None:
    model: Any = load_model(
        str(TINYLLAMA),
        center_writing_weights=False,  # SAELens's default for HookedTransformer
        torch_dtype="float64",
        default_prepend_bos=False,
        default_padding_side="left",
    )
    assert model.cfg.dtype == torch.float64
    assert model.tokenizer.padding_side == "left"
    assert model.to_tokens("x = 1").tolist() == [[89, 222, 30, 222, 18]]
    with pytest.raises(ValueError, match=r"center_writing_weights=True.*residual streams"):
        load_model(str(TINYLLAMA), center_writing_weights=True)


# --- what cannot be loaded -----------------------------------------------------------------------


def test_a_conversion_that_changes_the_model_is_refused(tmp_path: Path) -> None:
    # TransformerLens's Llama has no biases and drops them without a word
    folder = small_folder(tmp_path / "m", "Llama", attention_bias=True)
    with pytest.raises(ValueError, match=r"'.*m'.* off by [\d.]+ of.*'AutoModelForCausalLM'"):
        load_model(str(folder))
    assert n_layers(load_model(str(folder), "AutoModelForCausalLM")) == 4


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Phi", {}, "model_type='phi' is none of gemma, gemma2, gpt2"),
        (
            "Llama",
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type='linear'",
        ),
    ],
)
def test_an_unknown_family_names_the_way_out(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str
) -> None:
    folder = small_folder(tmp_path / "m", family, **changes)
    with pytest.raises(ValueError, match=rf"{reason}.*use model_class_name='AutoModelForCausalLM'"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("model_name", "message"),
    [
        ("./nowhere", r"model_name='\./nowhere': there is no such folder.*or 'demo'"),
        ("/no/where/at/all", "model_name='/no/where/at/all': there is no such folder"),
        ("~/no_such_model", "model_name='~/no_such_model': there is no such folder"),
        ("pythia-7m", "model_name='pythia-7m' is neither.*similar: pythia-70m"),
        ("someone/something", "model_name='someone/something' is neither.*TransformerBridge"),
    ],
)
def test_unknown_names(model_name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(model_name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_only_the_hub_knows(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model_name='EleutherAI/pythia-70m'.*local folder"):
        load_model("EleutherAI/pythia-70m", kind)


def test_folders_that_are_not_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model_name='.*': no config.json in"):
        load_model(str(tmp_path))
    shutil.copy(TINYLLAMA / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"model_name='.*': no usable tokenizer"):
        load_model(str(tmp_path))
    # transformers would read ./gpt2 and not the official model: better to say so
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model_name='gpt2': no config.json in gpt2"):
        load_model("gpt2")


def test_unknown_class_and_dtype() -> None:
    with pytest.raises(ValueError, match=r"model_class_name='HookedMamba' is none of Hooked"):
        load_model("demo", "HookedMamba")
    with pytest.raises(ValueError, match=r"dtype='float23' is not"):
        load_model("demo", dtype="float23")


def test_a_bridge_needs_transformer_lens_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "has_transformer_bridge", lambda: False)
    with pytest.raises(ValueError, match=r"model_class_name='TransformerBridge' needs transformer"):
        load_model("demo", "TransformerBridge")


# --- layers --------------------------------------------------------------------------------------


def test_default_routed_layers_are_the_middle_half() -> None:
    assert default_routed_layers(16) == list(range(3, 12))
    assert {n: default_routed_layers(n) for n in (1, 2, 3, 4, 7, 8)} == {
        1: [0],
        2: [0],
        3: [0, 1],
        4: [0, 1, 2],
        7: [0, 1, 2, 3, 4],
        8: [1, 2, 3, 4, 5],
    }
    for n in range(1, 100):
        layers = default_routed_layers(n)
        assert 0 <= layers[0] <= layers[-1] < n
    with pytest.raises(ValueError, match="n_layers=0"):
        default_routed_layers(0)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_outside_the_model(kind: str) -> None:
    model = load_model(str(TINYLLAMA), kind)
    for layers in ([3, 16], [-1]):
        with pytest.raises(ValueError, match=r"routed_layers=\[.*blocks 0 to 15"):
            residual_hook_names(model, layers)


@pytest.mark.parametrize("kind", KINDS)
def test_hook_names_are_as_the_model_spells_them(kind: str) -> None:
    name = {
        "HookedTransformer": "blocks.3.hook_resid_post",
        "TransformerBridge": "blocks.3.hook_out",
        "AutoModelForCausalLM": "model.layers.3",
    }[kind]
    assert residual_hook_names(load_model(str(TINYLLAMA), kind), [3]) == [name]
