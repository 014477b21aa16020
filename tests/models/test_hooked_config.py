"""A converted folder is the Hugging Face model, family by family, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import (
    LLAMA3_ROPE,
    MODEL_CLASSES,
    assert_same_streams,
    hugging_face_streams,
    random_tokens,
    residual_streams,
    small_folder,
)

from sae_lens_route.models.kinds import n_layers, residual_hook_names
from sae_lens_route.models.load import load_model

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


@pytest.mark.parametrize("kind", MODEL_CLASSES)
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
