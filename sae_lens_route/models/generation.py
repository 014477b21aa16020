"""Continuing a prompt with the model's own `generate`, the same way for every kind of model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel, context_length, model_device, tokenizer_of


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how often.

    Raises:
        UserError: an option that cannot be used.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    use_cache: bool

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: must be above 0; do_sample=False is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_k is not None and self.top_p is not None:
            raise UserError(
                f"top_k={self.top_k} and top_p={self.top_p}: TransformerLens takes one of them"
            )


@torch.no_grad()
def generate(model: LanguageModel, ids: Sequence[int], sampling: Sampling) -> list[int]:
    """Continue the tokens `ids`; returns the new ones."""
    tokens = torch.tensor([list(ids)], device=model_device(model))
    stop = _stop_token_ids(model)
    if isinstance(model, HookedProxyLM):
        output = _hugging_face_output(model, tokens, sampling, stop)
    else:
        output = _transformer_lens_output(model, tokens, sampling, stop)
    return output[0, len(ids) :].tolist()


def _hugging_face_output(
    model: HookedProxyLM, tokens: Int[Tensor, "1 pos"], sampling: Sampling, stop: list[int]
) -> Int[Tensor, "1 longer"]:
    pad = model.tokenizer.pad_token_id
    return cast("Any", model.model).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=sampling.max_new_tokens,
        use_cache=sampling.use_cache,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if pad is None and stop else pad,
        # every option is given, so that none comes from the model's generation defaults
        num_beams=1,
        repetition_penalty=1.0,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature if sampling.do_sample else None,
        top_k=(sampling.top_k or 0) if sampling.do_sample else None,
        top_p=(sampling.top_p or 1.0) if sampling.do_sample else None,
    )


def _transformer_lens_output(
    model: LanguageModel, tokens: Int[Tensor, "1 pos"], sampling: Sampling, stop: list[int]
) -> Int[Tensor, "1 longer"]:
    # Where BOS, EOS and padding are one token, a HookedTransformer looks for padding on the
    # tokenizer's side. On the left it spares BOS if told that there is one; these two arguments
    # have no other effect on tokens. A bridge takes tokens as they are.
    is_bridge = hasattr(model, "original_model")
    padding = {} if is_bridge else {"prepend_bos": True, "padding_side": "left"}
    return cast("Any", model).generate(
        tokens,
        max_new_tokens=sampling.max_new_tokens,
        use_past_kv_cache=sampling.use_cache,
        stop_at_eos=bool(stop),
        eos_token_id=stop or None,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        return_type="tokens",
        verbose=False,
        **padding,
    )


def _stop_token_ids(model: LanguageModel) -> list[int]:
    """Tokens that end a text: the tokenizer's EOS, and those of the model's generation defaults."""
    inner = getattr(model, "model" if isinstance(model, HookedProxyLM) else "original_model", None)
    listed = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    eos = tokenizer_of(model).eos_token_id
    return list(dict.fromkeys(i for i in [eos, *listed] if i is not None))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random state from `seed`, on the CPU and `device`; the global one is restored at the end."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(
        [] if on_cpu else [device.index or 0], device_type="cuda" if on_cpu else device.type
    ):
        torch.manual_seed(seed)
        yield


def continuation(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> str:
    """The new tokens as text, decoded after the prompt: some tokenizers trim a beginning."""

    def decoded(ids: Sequence[int]) -> str:
        return cast(
            str,
            tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
        )

    before, both = decoded(prompt_ids), decoded([*prompt_ids, *new_ids])
    # otherwise the prompt ends within a character
    return both[len(before) :] if both.startswith(before) else decoded(new_ids)


def require_fit(model: LanguageModel, prompt: str, n_prompt: int, max_new_tokens: int) -> None:
    """Check that a prompt and the new tokens fit into the model's context.

    Raises:
        UserError: they do not.
    """
    context = context_length(model)
    if context is not None and n_prompt + max_new_tokens > context:
        raise UserError(
            f"prompt={textwrap.shorten(prompt, 40, placeholder=' ...')!r}: its {n_prompt} tokens "
            f"and max_new_tokens={max_new_tokens} do not fit into the model's context of {context}"
        )
