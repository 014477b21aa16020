"""Steering: features clamped, raised, scaled or ablated while the model reads and writes.

A feature is edited where it lives, at the routed hook. There a token's routed activation x_route,
met at the token's own block (see `splice.py`), becomes

    z = encode(x_route),   z' = z with the edits,   x_route  <-  x_route + decode(z') - decode(z).

Only the difference is added, so what the SAE does not reconstruct stays in the model: a token whose
features the edits leave as they are keeps its bits, and edits that change nothing give the clean
model. With `use_error_term=False` steered tokens become decode(z') instead, error and all lost.

`steer` writes a text twice from one seed, clean and steered:

1. The prompt becomes tokens: by the tokenizer's chat template if it has one, otherwise as text,
   with BOS if the SAE was trained with it.
2. The model's own `generate` writes, with nothing attached: the clean text.
3. With the routed hook attached and the edits at it, the same `generate` writes the steered text.
   The hook fires several times in a pass, so it is a function of what it is given and keeps, for
   each position, what it found at the last firing: what was really used.

A token is edited when the model reads it, so that its edit acts on the tokens after it. The token
written last is read by nobody and never edited. Tokens of the prompt that the SAE was not trained
on (BOS, EOS, padding) are left alone: the SAE knows nothing of them.

**Units.** Values are feature activations as the SAE sees them, on the routed activation scaled by
its p: a token with p = 0.5 has half the activation of the same token with p = 1. A value is
therefore the same share of every token's SAE input, and what reaches the residual stream is the
value times `scale / p`. The paper clamps to 20 at d_in 2048; `default_clamp` carries that over.
"""

from __future__ import annotations

import copy
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args, overload

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_route.models import LanguageModel
from sae_lens_route.router import Routing
from sae_lens_route.saes import RoutedSAE
from sae_lens_route.splice import RoutedHook, attach

EditMode = Literal["set", "add", "scale", "ablate"]
Where = Literal["prompt", "generated", "both"]

_WORDS = {"set": "set to {}", "add": "plus {}", "scale": "times {}", "ablate": "ablated"}


def default_clamp(d_in: int) -> float:
    """The paper's clamp to 20 as a share of sqrt(d_in), the norm of a normalised activation."""
    return 20.0 * (d_in / 2048) ** 0.5


@dataclass(frozen=True)
class FeatureEdit:
    """What happens to one feature.

    Args:
        feature: index of the feature, below d_sae.
        mode: "set" makes the activation `value` on every steered token, active there or not (the
            paper's clamp); "add" adds `value`; "scale" multiplies by it; "ablate" makes it 0.
        value: of the edit, in activation units ("scale": a factor); negative steers away. Left out
            for "ablate".
    """

    feature: int
    mode: EditMode = "set"
    value: int | float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.feature, bool) or not isinstance(self.feature, int) or self.feature < 0:
            raise ValueError(f"feature={self.feature!r}: must be an index, 0 or more")
        if self.mode not in _WORDS:
            raise ValueError(f"mode={self.mode!r}: must be one of {', '.join(_WORDS)}")
        if self.mode == "ablate":
            if self.value not in (None, 0):
                raise ValueError(f"value={self.value!r}: 'ablate' takes none, it sets to 0")
        elif (
            isinstance(self.value, bool)
            or not isinstance(self.value, int | float)
            or not math.isfinite(self.value)
        ):
            raise ValueError(f"value={self.value!r}: mode={self.mode!r} needs a finite number")

    @classmethod
    def parse(cls, text: str) -> FeatureEdit:
        """An edit written FEATURE:MODE:VALUE, such as "17:set:5", "17:scale:-1" or "17:ablate".

        Raises:
            ValueError: it is not written so, or names a mode or value that cannot be.
        """
        feature, mode, value = (*text.split(":", 2), "", "")[:3]
        try:
            if mode not in _WORDS:
                raise ValueError(f"mode={mode!r}: must be one of {', '.join(_WORDS)}")
            number = float(value) if value else None
            return cls(int(feature), cast(EditMode, mode), number)
        except ValueError as error:
            raise ValueError(
                f"edit={text!r}: written FEATURE:MODE:VALUE, such as 17:set:5, 17:add:2, "
                f"17:scale:0.5 or 17:ablate ({error})"
            ) from error

    def __str__(self) -> str:
        value = 0.0 if self.value is None else self.value
        return f"feature {self.feature} {_WORDS[self.mode].format(f'{value:g}')}"

    def apply(self, acts: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The feature's activations after the edit."""
        if self.mode == "set":
            return torch.full_like(acts, cast(float, self.value))
        if self.mode == "add":
            return acts + cast(float, self.value)
        if self.mode == "scale":
            return acts * cast(float, self.value)
        return torch.zeros_like(acts)


# --- at the hook ---------------------------------------------------------------------------------


def edit_features(
    sae: SAE[Any],
    edits: FeatureEdit | Sequence[FeatureEdit],
    positions: Sequence[int] | Bool[Tensor, ...] | None = None,
    *,
    use_error_term: bool = True,
) -> Callable[..., Float[Tensor, "batch pos d"]]:
    """A hook function that edits features, for `run_with_hooks` at `sae.cfg.metadata.hook_name`.

        with attach(model, sae):
            hooks = [(sae.cfg.metadata.hook_name, edit_features(sae, FeatureEdit(17, "set", 5)))]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)

    It keeps no state and is differentiable. It treats every token by itself, so it also serves
    during generation; `positions` then count from the start of each pass, not of the text.

    Args:
        sae: The SAE at that hook.
        edits: One or several, at most one per feature.
        positions: Which tokens to edit: indices of positions, or a mask `[pos]` or `[batch, pos]`;
            None is all of them. The others are returned unchanged, to the bit.
        use_error_term: Add only the difference that the edits make; otherwise the edited
            reconstruction replaces the activation.

    Raises:
        ValueError: edits that the SAE cannot take; positions outside of a pass, when that is run.
    """
    edits = _checked_edits(edits, sae)

    def hook_function(
        x_route: Float[Tensor, "batch pos d"], hook: Any = None
    ) -> Float[Tensor, "batch pos d"]:
        mask = None if positions is None else _position_mask(positions, x_route)
        return _edit(sae, edits, x_route, mask, use_error_term).x_route

    return hook_function


class _Edited(NamedTuple):
    x_route: Float[Tensor, "batch pos d"]
    """The activation with the edits in."""
    before: Float[Tensor, "batch pos n"]
    """Activations of the n features that edits are about."""
    after: Float[Tensor, "batch pos n"]
    """The same after the edits; as before on tokens that are not steered."""


def _edit(
    sae: SAE[Any],
    edits: Sequence[FeatureEdit],
    x_route: Float[Tensor, "batch pos d"],
    mask: Bool[Tensor, ...] | None,
    use_error_term: bool,
) -> _Edited:
    acts = sae.encode(x_route)
    features = torch.tensor([edit.feature for edit in edits], device=acts.device)
    before = acts[..., features]
    after = torch.stack([e.apply(before[..., i]) for i, e in enumerate(edits)], dim=-1)
    if mask is not None:
        after = torch.where(mask.unsqueeze(-1), after, before)
    result = sae.decode(acts.index_copy(-1, features, after))
    if use_error_term:
        result = x_route + (result - sae.decode(acts))
        mask = (after != before).any(dim=-1)  # a token without a difference keeps its bits
    if mask is not None:
        result = torch.where(mask.unsqueeze(-1), result, x_route)
    return _Edited(result, before, after)


def _position_mask(
    positions: Sequence[int] | Bool[Tensor, ...], x_route: Float[Tensor, "batch pos d"]
) -> Bool[Tensor, "batch pos"]:
    shape = x_route.shape[:-1]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        try:
            return positions.to(x_route.device).expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"positions: a mask {list(positions.shape)} does not fit a pass {list(shape)}"
            ) from error
    n = shape[1]
    outside = [int(p) for p in positions if not -n <= p < n]
    if outside:
        raise ValueError(f"positions={outside}: outside of a pass of {n} tokens")
    mask = torch.zeros(shape, dtype=torch.bool, device=x_route.device)
    mask[:, [int(p) for p in positions]] = True
    return mask


def _checked_edits(
    edits: FeatureEdit | Sequence[FeatureEdit], sae: SAE[Any]
) -> tuple[FeatureEdit, ...]:
    edits = (edits,) if isinstance(edits, FeatureEdit) else tuple(edits)
    if not edits:
        raise ValueError("edits=[]: at least one is needed")
    seen: set[int] = set()
    for edit in edits:
        if edit.feature >= sae.cfg.d_sae:
            raise ValueError(
                f"feature={edit.feature}: the SAE has features 0 to {sae.cfg.d_sae - 1}"
            )
        if edit.feature in seen:
            raise ValueError(f"feature={edit.feature}: has two edits, and can take one")
        seen.add(edit.feature)
    return edits


# --- a text, clean and steered -------------------------------------------------------------------


class SteeredToken(NamedTuple):
    """One token of the steered text, prompt included, and what was done to it."""

    token: str
    """The token as it reads in the text."""
    token_id: int
    generated: bool
    """Written by the model; otherwise of the prompt."""
    steered: bool
    """Whether the edits were applied to it (they may have left its activations as they were)."""
    block: int | None
    """Block that the token was routed to, where the edit landed; None for the last token, which
    the model did not read any more."""
    weight: float | None
    """Route weight p of that block, or None as for `block`."""
    before: tuple[float, ...] | None
    """Activations that the edited features had there, in the order of the edits."""
    after: tuple[float, ...] | None
    """The same after the edits; equal to `before` on a token that was not steered."""


class SteeringResult(NamedTuple):
    """What the model writes after a prompt, steered and clean, from the same seed."""

    prompt: str
    """As it was given."""
    text: str
    """What the steered model wrote, without the prompt."""
    clean_text: str
    """What the model wrote without the edits."""
    tokens: tuple[SteeredToken, ...]
    """The prompt as the model read it (chat template and BOS included) and the steered text."""
    clean_token_ids: tuple[int, ...]
    """Tokens of the clean text, without the prompt's."""
    edits: tuple[FeatureEdit, ...]
    where: Where
    """Which tokens were steered."""
    seed: int

    @property
    def n_steered(self) -> int:
        """How many tokens the edits were applied to."""
        return sum(token.steered for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, lists, strings and numbers, for JSON."""
        return {
            **self._asdict(),
            "tokens": [token._asdict() for token in self.tokens],
            "edits": [asdict(edit) for edit in self.edits],
        }


class _Options(TypedDict, total=False):
    where: Where
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    use_error_term: bool
    chat_template: bool
    use_cache: bool


@overload
def steer(
    model: LanguageModel,
    sae: RoutedSAE,
    prompt: str,
    edits: FeatureEdit | Sequence[FeatureEdit],
    **options: Unpack[_Options],
) -> SteeringResult: ...


@overload
def steer(
    model: LanguageModel,
    sae: RoutedSAE,
    prompt: list[str],
    edits: FeatureEdit | Sequence[FeatureEdit],
    **options: Unpack[_Options],
) -> list[SteeringResult]: ...


def steer(
    model: LanguageModel,
    sae: RoutedSAE,
    prompt: str | list[str],
    edits: FeatureEdit | Sequence[FeatureEdit],
    *,
    where: Where = "both",
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_error_term: bool = True,
    chat_template: bool = True,
    use_cache: bool = True,
) -> SteeringResult | list[SteeringResult]:
    """Let the model write with features edited, and without, from the same seed.

    Args:
        model: A HookedTransformer, a TransformerBridge or a HookedProxyLM, with its tokenizer and
            no RouteSAE attached; it is left as it was.
        sae: A RouteSAE of that model.
        prompt: A text, or several. Each is written by itself, so that its text depends neither on
            padding nor on the other prompts.
        edits: One or several, at most one per feature.
        where: Steer tokens of the prompt, tokens that the model wrote itself ("generated"; the
            first of them still comes from an unsteered prompt), or both.
        max_new_tokens: Tokens to write; fewer if the model ends the text.
        do_sample: Sample; otherwise the most probable token is taken each time.
        temperature: Of sampling.
        top_k: Sample from the k most probable tokens only.
        top_p: Sample from the most probable tokens that have this probability together.
        seed: Of sampling. The global random state is left as it was.
        use_error_term: Add only the difference that the edits make; otherwise the edited
            reconstruction replaces the activation of steered tokens.
        chat_template: Put the prompt into the tokenizer's chat template, if it has one, as the
            user's turn.
        use_cache: Keep keys and values from pass to pass; without, every pass reads all the text.

    Returns:
        One result for one prompt, a list for several.

    Raises:
        ValueError: before any work, for a field that cannot be used, a prompt that does not fit
            into the model's context with what is to be written, a soft-routed SAE, which can only
            be read, or an SAE that cannot be attached.
    """
    edits = _checked_edits(edits, sae)
    if sae.cfg.routing == "soft":
        raise ValueError(
            "routing='soft': this SAE mixes all blocks for every token, so that there is no single "
            "one where an edit could land; steer with a hard-routed one"
        )
    if where not in get_args(Where):
        raise ValueError(f"where={where!r}: must be one of {', '.join(get_args(Where))}")
    sampling = _Sampling(max_new_tokens, do_sample, temperature, top_k, top_p, use_cache)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("model.tokenizer is None: steering reads and writes text")
    all_ids = [_prompt_ids(tokenizer, sae, text, chat_template) for text in prompts]
    for text, ids in zip(prompts, all_ids, strict=True):
        _require_fit(model, text, len(ids), max_new_tokens)
    attach(model, sae).remove()  # raises what it has to say about the model before any work
    untrained = set(_untrained_token_ids(tokenizer, sae))

    results = []
    for text, ids in zip(prompts, all_ids, strict=True):
        with _seeded(seed, _device(model)):
            clean = _generate(model, ids, sampling)
        # a copy draws uniform routes from its seed again, so that calls do not depend on each other
        at_hook = copy.copy(sae) if sae.cfg.routing == "uniform" else sae
        with attach(model, at_hook) as handle, _seeded(seed, _device(model)):
            in_prompt = [where != "generated" and token not in untrained for token in ids]
            watch = _Watch(handle, edits, in_prompt, where != "prompt", use_error_term)
            cast(Any, handle.hook_point).add_hook(watch)
            steered = _generate(model, ids, sampling)
            tokens = watch.report(tokenizer, [*ids, *steered])
        results.append(
            SteeringResult(
                prompt=text,
                text=_continuation(tokenizer, ids, steered),
                clean_text=_continuation(tokenizer, ids, clean),
                tokens=tokens,
                clean_token_ids=tuple(clean),
                edits=edits,
                where=where,
                seed=seed,
            )
        )
    return results[0] if isinstance(prompt, str) else results


class _Read(NamedTuple):
    """What the hook found in one pass, at its last firing; batch of 1 taken off."""

    layer: Int[Tensor, " pos"]
    weight: Float[Tensor, " pos"]
    before: Float[Tensor, "pos n"]
    after: Float[Tensor, "pos n"]


class _Watch:
    """The hook function of one steered text: edits, and remembers what it edited.

    The positions of a pass follow from its length: the first one holds the prompt, and a later one
    either one new token (with a cache) or all tokens so far (without).
    """

    def __init__(
        self,
        handle: RoutedHook,
        edits: Sequence[FeatureEdit],
        in_prompt: list[bool],
        generated: bool,
        use_error_term: bool,
    ) -> None:
        self._handle, self._edits, self._use_error_term = handle, edits, use_error_term
        self._in_prompt, self._generated = in_prompt, generated
        self._routing: Routing | None = None
        self._start, self._n_seen = 0, 0
        self._reads: list[_Read] = []

    def _is_steered(self, position: int) -> bool:
        if position < len(self._in_prompt):
            return self._in_prompt[position]
        return self._generated

    def __call__(
        self, x_route: Float[Tensor, "1 pos d"], hook: Any = None
    ) -> Float[Tensor, "1 pos d"]:
        n, routing = x_route.shape[1], self._handle.routing
        assert routing is not None
        if routing is not self._routing:  # the first firing of a new pass
            self._routing = routing
            self._start = 0 if n == self._n_seen + 1 else self._n_seen
            self._n_seen = self._start + n
            if self._start == 0:
                self._reads.clear()
        else:
            self._reads.pop()
        steered = [self._is_steered(p) for p in range(self._start, self._n_seen)]
        mask = torch.tensor([steered], device=x_route.device)
        edited = _edit(self._handle.sae, self._edits, x_route, mask, self._use_error_term)
        found = (routing.layer, routing.weight, edited.before, edited.after)
        self._reads.append(_Read(*(part[0].detach() for part in found)))
        return edited.x_route

    def report(self, tokenizer: Any, ids: Sequence[int]) -> tuple[SteeredToken, ...]:
        """One row per token; those after the last one that was read have no block."""
        parts = [torch.cat(part).tolist() for part in zip(*self._reads, strict=True)]
        reads = [*zip(*parts, strict=True), *[None] * (len(ids) - self._n_seen)]
        tokens = []
        for position, (token_id, read) in enumerate(zip(ids, reads, strict=True)):
            token = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            generated = position >= len(self._in_prompt)
            if read is None:
                tokens.append(SteeredToken(token, token_id, generated, False, *[None] * 4))
                continue
            layer, weight, before, after = read
            tokens.append(
                SteeredToken(
                    token,
                    token_id,
                    generated,
                    steered=self._is_steered(position),
                    block=self._handle.routed_blocks[layer],
                    weight=weight,
                    before=tuple(before),
                    after=tuple(after),
                )
            )
        return tuple(tokens)


# --- text and tokens -----------------------------------------------------------------------------


def _prompt_ids(tokenizer: Any, sae: RoutedSAE, prompt: str, chat_template: bool) -> list[int]:
    if chat_template and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        bos = tokenizer.bos_token_id
        # as SAELens's store begins a context; None is what an SAE without that metadata says
        wants_bos = sae.cfg.metadata.prepend_bos in (None, True)
        if wants_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
    if not ids:
        raise ValueError(f"prompt={prompt!r}: has no tokens, so there is nothing to continue")
    return list(ids)


def _untrained_token_ids(tokenizer: Any, sae: RoutedSAE) -> Sequence[int]:
    """Special tokens that were masked while the SAE was trained."""
    excluded = sae.cfg.metadata.exclude_special_tokens
    return get_special_token_ids(tokenizer) if excluded is True else excluded or ()


def _continuation(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The new tokens as text; decoded after the prompt, since some tokenizers trim a beginning."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt_ids, **options)
    both = tokenizer.decode([*prompt_ids, *new_ids], **options)
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(new_ids, **options)  # the prompt ends within a character


def _context_length(model: Any) -> int | None:
    if isinstance(model, HookedProxyLM):
        config = cast(Any, model.model).config.get_text_config()
        return getattr(config, "max_position_embeddings", None)
    return model.cfg.n_ctx


def _require_fit(model: Any, prompt: str, n_prompt: int, max_new_tokens: int) -> None:
    context = _context_length(model)
    if context is not None and n_prompt + max_new_tokens > context:
        raise ValueError(
            f"prompt={textwrap.shorten(prompt, 40, placeholder=' ...')!r}: its {n_prompt} tokens "
            f"and max_new_tokens={max_new_tokens} do not fit into the model's context of {context}"
        )


# --- generation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampling:
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    use_cache: bool

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}: must be above 0; do_sample=False is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_k is not None and self.top_p is not None:
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p}: TransformerLens takes one of them"
            )


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(
        [] if on_cpu else [device.index or 0], device_type="cuda" if on_cpu else device.type
    ):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _generate(model: Any, ids: Sequence[int], sampling: _Sampling) -> list[int]:
    """What the model's own `generate` writes after the tokens `ids`."""
    tokens = torch.tensor([ids], device=_device(model))
    tokenizer = model.tokenizer
    stop = _stop_token_ids(model, tokenizer)
    common = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.do_sample}
    if isinstance(model, HookedProxyLM):
        # all of them given, so that none comes from the model's own generation defaults
        drawn = {
            "temperature": sampling.temperature if sampling.do_sample else None,
            "top_k": (sampling.top_k or 0) if sampling.do_sample else None,
            "top_p": (sampling.top_p or 1.0) if sampling.do_sample else None,
        }
        pad = stop[0] if tokenizer.pad_token_id is None and stop else tokenizer.pad_token_id
        output = cast(Any, model.model).generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            use_cache=sampling.use_cache,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=stop or None,
            pad_token_id=pad,
            **common,
            **drawn,
        )
    else:
        output = model.generate(
            tokens,
            stop_at_eos=bool(stop),
            eos_token_id=stop or None,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            use_past_kv_cache=sampling.use_cache,
            return_type="tokens",
            verbose=False,
            **_padding(model),
            **common,
        )
    return output[0, len(ids) :].tolist()


def _padding(model: Any) -> dict[str, Any]:
    """Keeps TransformerLens from taking a token for padding, where BOS, EOS and padding are one.

    It looks for padding at the tokenizer's side. On the left it makes an exception for BOS if told
    that there is one; these two arguments do nothing else to tokens.
    """
    if hasattr(model, "original_model"):  # a bridge takes tokens as they are
        return {}
    return {"prepend_bos": True, "padding_side": "left"}


def _stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's EOS, and those of the model's generation defaults."""
    inner = getattr(model, "model" if isinstance(model, HookedProxyLM) else "original_model", None)
    listed = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *listed] if i is not None))


# --- for people ----------------------------------------------------------------------------------


def render(result: SteeringResult, *, width: int = 100, tokens: bool = True) -> str:
    """The two texts side by side and, if `tokens`, one line per token of what was done to it.

    Args:
        result: What `steer` returned for one prompt.
        width: of a line of the two texts, in characters.
        tokens: with the report by token.
    """
    column = max(20, (width - 3) // 2)
    left, right = _wrapped(result.clean_text, column), _wrapped(result.text, column)
    left += [""] * (len(right) - len(left))
    right += [""] * (len(left) - len(right))
    lines = [
        f"prompt   {_quoted(result.prompt)}",
        f"edits    {'; '.join(map(str, result.edits))}",
        f"steered  {result.n_steered} of {len(result.tokens)} tokens ({result.where})",
        "",
        f"{'clean':{column}} | steered",
        f"{'-' * column}-+-{'-' * column}",
        *(f"{a:{column}} | {b}".rstrip() for a, b in zip(left, right, strict=True)),
    ]
    if tokens:
        names = [f"{f'feature {edit.feature}':16}" for edit in result.edits]
        lines += ["", "  ".join([f"{'token':20}", "     ", "block", "    p", *names]).rstrip()]
        lines += [_token_line(token, names) for token in result.tokens]
    return "\n".join(lines)


def _token_line(token: SteeredToken, names: Sequence[str]) -> str:
    origin = "wrote" if token.generated else "read"
    cells = [f"{_quoted(token.token)[:20]:20}", f"{origin:5}"]
    if token.before is None or token.after is None:
        return "  ".join([*cells, "    -", "    -"])
    cells += [f"{token.block:5}", f"{token.weight:5.2f}"]
    for name, before, after in zip(names, token.before, token.after, strict=True):
        change = f"{before:.2f} -> {after:.2f}" if token.steered else f"{before:.2f}"
        cells.append(f"{change:{len(name)}}")
    return "  ".join(cells).rstrip()


def _quoted(text: str) -> str:
    """In quotation marks, with line ends and the like written out."""
    return json.dumps(text, ensure_ascii=False)


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.expandtabs(4).splitlines() or [""]:
        lines += textwrap.wrap(line, width, drop_whitespace=False, break_on_hyphens=False) or [""]
    return lines
