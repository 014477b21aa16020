"""TransformerLens's configuration of a Hugging Face model, from its `config.json`.

TransformerLens itself would guess the family from words in the *path*, and its 2.x ignores
`rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from typing import Any

from sae_lens_route.errors import UserError

_N_CTX_LIMIT = 2048
"""Context of a converted folder unless `n_ctx` is given: that of TransformerLens for Llama 3.2. Its
2.x keeps an `[n_ctx, n_ctx]` mask in every block, 16 GiB each at that model's 131,072 tokens."""

_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def hooked_config(hf_config: Any) -> dict[str, Any]:
    """The fields of a HookedTransformerConfig that describe this Hugging Face configuration.

    Raises:
        UserError: a family or a kind of rotary embedding that is not supported here.
    """
    family = hf_config.model_type
    if family not in _ARCHITECTURES:
        raise UserError(f"model_type={family!r} is none of {', '.join(_ARCHITECTURES)}")
    fields = {
        "original_architecture": _ARCHITECTURES[family],
        "d_model": hf_config.hidden_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_heads": hf_config.num_attention_heads,
        "d_head": getattr(hf_config, "head_dim", None)
        or hf_config.hidden_size // hf_config.num_attention_heads,
        "d_vocab": hf_config.vocab_size,
        "n_ctx": min(hf_config.max_position_embeddings, _N_CTX_LIMIT),
    }
    if family == "gpt2":
        return fields | {
            "d_mlp": hf_config.n_inner or 4 * hf_config.hidden_size,
            "act_fn": hf_config.activation_function,
            "normalization_type": "LN",
            "eps": hf_config.layer_norm_epsilon,
            "use_attn_scale": hf_config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": hf_config.scale_attn_by_inverse_layer_idx,
        }
    activation = "hidden_activation" if family == "gemma2" else "hidden_act"
    fields |= {"d_mlp": hf_config.intermediate_size, "act_fn": getattr(hf_config, activation)}
    fields |= _rotary_fields(hf_config, fields["d_head"])
    if family == "gpt_neox":
        return fields | {
            "normalization_type": "LN",
            "eps": hf_config.layer_norm_eps,
            "parallel_attn_mlp": hf_config.use_parallel_residual,
        }
    n_key_value_heads = hf_config.num_key_value_heads
    if family in ("llama", "qwen3") and n_key_value_heads == fields["n_heads"]:
        n_key_value_heads = None  # plain attention; the other families' converters want the number
    fields |= {
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": hf_config.rms_norm_eps,
        "gated_mlp": True,
        "n_key_value_heads": n_key_value_heads,
        "use_qk_norm": family == "qwen3",
    }
    fields |= _sliding_window_fields(hf_config)
    if family == "gemma2":
        fields |= {
            "attn_scale": hf_config.query_pre_attn_scalar**0.5,
            "use_normalization_before_and_after": True,
        }
        if hf_config.attn_logit_softcapping is not None:
            fields["attn_scores_soft_cap"] = hf_config.attn_logit_softcapping
        if hf_config.final_logit_softcapping is not None:
            fields["output_logits_soft_cap"] = hf_config.final_logit_softcapping
    return fields


def _rotary_fields(hf_config: Any, d_head: int) -> dict[str, Any]:
    # transformers 5 keeps all values in rope_parameters, 4 in attributes and in rope_scaling
    rope: dict[str, Any] = {
        "rope_theta": getattr(hf_config, "rope_theta", None),
        "partial_rotary_factor": getattr(hf_config, "partial_rotary_factor", None),
        **(getattr(hf_config, "rope_scaling", None) or {}),
        **(getattr(hf_config, "rope_parameters", None) or {}),
    }
    fields = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rope["rope_theta"],
        "rotary_dim": int(d_head * (rope["partial_rotary_factor"] or 1.0)),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return fields
    if kind != "llama3":
        raise UserError(f"rotary embeddings of rope_type={kind!r} are not supported")
    return fields | {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": rope["factor"],
        "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
        "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
        "NTK_original_ctx_len": rope["original_max_position_embeddings"],
    }


def _sliding_window_fields(hf_config: Any) -> dict[str, Any]:
    window = getattr(hf_config, "sliding_window", None)
    layer_types = getattr(hf_config, "layer_types", None) or []
    if not layer_types and hf_config.model_type == "mistral":  # one window for all blocks
        layer_types = ["sliding_attention"] * hf_config.num_hidden_layers
    if window is None or "sliding_attention" not in layer_types:
        return {}
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": ["local" if t == "sliding_attention" else "global" for t in layer_types],
    }
