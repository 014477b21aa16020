"""`steer`: a text written with features edited, and without, from the same seed.

1. The prompt becomes tokens: through the tokenizer's chat template if it has one, otherwise as
   text, with BOS prepended if the SAE was trained with it. What a template puts before the user's
   text, such as a system prompt, is not steered unless asked for.
2. The model's own `generate` writes with nothing attached: the clean text.
3. With the routed hook attached and the edits at it (`edits.py`), the same `generate` writes the
   steered text. The hook point fires several times per pass; the last firing holds the activations
   that were used, and these are reported.

A token is edited when the model reads it, so its edit acts on the tokens after it. The last token
written is never read and never edited. Tokens that the SAE excludes (`data/kept_tokens.py`: special
tokens, positions outside `seqpos_slice`), read or written, are never edited: the SAE was not
trained on them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from jinja2 import TemplateError
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerBase

from sae_lens_route.data.kept_tokens import KeptTokens
from sae_lens_route.errors import UserError
from sae_lens_route.models.generation import Sampling, continuation, generate, require_fit, seeded
from sae_lens_route.models.kinds import LanguageModel, model_device, token_embedding, tokenizer_of
from sae_lens_route.records import plain
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.router import Routing
from sae_lens_route.saes.units import Units, activation_unit, require_units
from sae_lens_route.splice import RoutedHook, attach
from sae_lens_route.steering.edits import (
    FeatureEdit,
    absolute_edits,
    apply_edits,
    checked_edits,
)

Where = Literal["prompt", "generated", "both"]

LARGE_EDIT = 1.0
"""Norm of an edit over the norm of the stream above which a result says that it is large."""


class SteeredToken(NamedTuple):
    """One token of the prompt or the steered text, and its edits."""

    token: str
    """The token as text."""
    token_id: int
    generated: bool
    """Written by the model; otherwise part of the prompt."""
    steered: bool
    """Whether the edits were applied (they may have left the activations unchanged)."""
    block: int | None
    """Block that the token was routed to and edited at; None for the last token, which the model
    did not read."""
    weight: float | None
    """Route weight p of that block; None as for `block`."""
    before: tuple[float, ...] | None
    """Activations of the edited features, in the order of the edits; None as for `block`."""
    after: tuple[float, ...] | None
    """The same after the edits; equal to `before` on a token that was not steered."""
    relative_size: float | None
    """Norm of the edit over the norm of the stream at that block with its mean over d subtracted; 0
    on a token that was not steered, None as for `block`."""


class SteeringResult(NamedTuple):
    """The texts that the model writes after a prompt, steered and clean, from the same seed."""

    prompt: str
    """As it was given."""
    text: str
    """Text of the steered model, without the prompt."""
    clean_text: str
    """Text of the model without edits."""
    tokens: tuple[SteeredToken, ...]
    """The prompt as the model read it (chat template and BOS included) and the steered text."""
    clean_token_ids: tuple[int, ...]
    """Tokens of the clean text, without the prompt's."""
    edits: tuple[FeatureEdit, ...]
    """Relative ones with the value that they came to."""
    units: Units
    """Of the edits' values and the activations."""
    where: Where
    """Tokens that were steered."""
    seed: int

    @property
    def n_steered(self) -> int:
        """Number of tokens that the edits were applied to."""
        return sum(token.steered for token in self.tokens)

    @property
    def warning(self) -> str | None:
        """What to do about edits larger than the streams they were added to; None without any."""
        sizes = [token.relative_size or 0.0 for token in self.tokens]
        n_large, largest = sum(size > LARGE_EDIT for size in sizes), max(sizes)
        if n_large == 0:
            return None
        return (
            f"{n_large} of {self.n_steered} edits are larger than the stream they change, up to "
            f"{largest:.1f} times its norm, which breaks most models whatever the feature: choose "
            "smaller values, or multiples of the feature's maximum such as 17:set:1x"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, strings and numbers, for JSON."""
        return {**plain(self), "warning": self.warning}


def steer(
    model: LanguageModel,
    sae: RoutedSAEMixin,
    prompt: str,
    edits: FeatureEdit | Sequence[FeatureEdit],
    *,
    maxima: Mapping[int, float] | None = None,
    units: Units = "n(x)",
    where: Where = "both",
    steer_system: bool = False,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_error_term: bool = True,
    chat_template: bool = True,
    use_cache: bool = True,
) -> SteeringResult:
    """Let the model write with features edited, and without, from the same seed.

    Args:
        model: A HookedTransformer, a TransformerBridge or a HookedProxyLM, with its tokenizer and
            no RouteSAE attached; it is left as it was.
        sae: A RouteSAE of that model.
        prompt: The text to continue.
        edits: One or several, at most one per feature.
        maxima: Feature -> its largest activation, for relative edits (`maxima.py`).
        units: Of the values, the maxima and the reported activations (`saes/units.py`).
        where: Steer tokens of the prompt, tokens that the model wrote itself ("generated"; the
            first of them still comes from an unsteered prompt), or both.
        steer_system: Count what the chat template puts before the user's text, such as a system
            prompt, as tokens of the prompt.
        max_new_tokens: Tokens to write; fewer if the model ends the text.
        do_sample: Sample; otherwise the most probable token is taken each time.
        temperature: Sampling temperature.
        top_k: Sample from the k most probable tokens only.
        top_p: Sample from the most probable tokens that have this probability together.
        seed: Seed of the sampling. The global random state is left as it was.
        use_error_term: Add only the difference that the edits make; otherwise the edited
            reconstruction replaces the activation of steered tokens.
        chat_template: Apply the tokenizer's chat template, if it has one, with the prompt as the
            user's turn.
        use_cache: Keep keys and values between passes; otherwise every pass reads all the text.

    Raises:
        UserError: before any work: an option that cannot be used, a prompt that does not fit into
            the model's context together with the new tokens, a soft-routed SAE, which can only be
            read, or an SAE that cannot be attached.
    """
    require_units(units)
    edits = absolute_edits(checked_edits(edits, sae), maxima)
    if sae.cfg.routing == "soft":
        raise UserError(
            "routing='soft': this SAE mixes all blocks for every token, so that there is no single "
            "one where an edit could land; steer with a hard-routed one"
        )
    if where not in get_args(Where):
        raise UserError(f"where={where!r}: must be one of {', '.join(get_args(Where))}")
    sampling = Sampling(max_new_tokens, do_sample, temperature, top_k, top_p, use_cache)
    tokenizer = tokenizer_of(model)
    ids, n_before = _prompt_ids(tokenizer, sae, prompt, chat_template)
    steerable = _Steerable(
        where, 0 if steer_system else n_before, len(ids), KeptTokens.of(sae, tokenizer)
    )
    require_fit(model, prompt, len(ids), max_new_tokens)
    attach(model, sae).remove()  # raises for metadata that does not fit, before any work
    with seeded(seed, model_device(model)):
        clean = generate(model, ids, sampling)
    # a copy draws uniform routes from its seed again, so calls do not depend on each other
    spliced = copy.copy(sae) if sae.cfg.routing == "uniform" else sae
    with attach(model, spliced) as handle, seeded(seed, model_device(model)):
        hook = _SteeringHook(handle, edits, units, steerable, use_error_term)
        with hook.installed(model):
            steered = generate(model, ids, sampling)
    return SteeringResult(
        prompt=prompt,
        text=continuation(tokenizer, ids, steered),
        clean_text=continuation(tokenizer, ids, clean),
        tokens=hook.report(tokenizer, [*ids, *steered]),
        clean_token_ids=tuple(clean),
        edits=edits,
        units=units,
        where=where,
        seed=seed,
    )


class _Steerable(NamedTuple):
    """Which tokens of a text are edited."""

    where: Where
    first: int
    """Position of the first token that may be."""
    n_prompt: int
    kept: KeptTokens

    def mask(self, ids: Sequence[int], start: int) -> Bool[Tensor, "1 pos"]:
        """Of the tokens `ids`, the first of which has the position `start`."""
        at = torch.arange(start, start + len(ids))
        mask = self.kept.mask(torch.tensor([ids]), start) & (at >= self.first)
        if self.where == "both":
            return mask
        return mask & ((at < self.n_prompt) == (self.where == "prompt"))


class _Read(NamedTuple):
    """The last firing of one pass, without its batch dimension of 1."""

    route: Int[Tensor, " pos"]
    weight: Float[Tensor, " pos"]
    steered: Bool[Tensor, " pos"]
    before: Float[Tensor, "pos n"]
    after: Float[Tensor, "pos n"]
    relative_size: Float[Tensor, " pos"]


class _SteeringHook:
    """The hook function of one steered text: applies the edits and records them.

    The first pass reads the prompt, a later one either one new token (with a cache) or all tokens
    so far (without). Their ids are read at the token embedding.
    """

    def __init__(
        self,
        handle: RoutedHook,
        edits: Sequence[FeatureEdit],
        units: Units,
        steerable: _Steerable,
        use_error_term: bool,
    ) -> None:
        self._handle, self._edits, self._steerable = handle, edits, steerable
        self._units: Units = units
        self._use_error_term = use_error_term
        self._routing: Routing | None = None
        self._ids: list[int] = []
        self._start, self._n_seen = 0, 0
        self._reads: list[_Read] = []

    @contextmanager
    def installed(self, model: LanguageModel) -> Iterator[None]:
        """Edits at the hook point of `model`, until the handle is removed."""
        cast("Any", self._handle.hook_point).add_hook(self)
        tokens_hook = token_embedding(model).register_forward_pre_hook(self._read_tokens)
        try:
            yield
        finally:
            tokens_hook.remove()

    def _read_tokens(self, embedding: nn.Module, args: tuple) -> None:
        new = args[0][0].tolist()
        self._ids = [*self._ids, *new] if len(new) == 1 else new

    def __call__(
        self, x_route: Float[Tensor, "1 pos d"], hook: HookPoint | None = None
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
        assert len(self._ids) >= self._n_seen
        sae, ids = self._handle.sae, self._ids[self._start : self._n_seen]
        mask = self._steerable.mask(ids, self._start).to(x_route.device)
        unit = activation_unit(routing, sae, self._units)
        edited = apply_edits(sae, self._edits, x_route, unit, mask, self._use_error_term)
        size = _relative_norm(edited.x_route - x_route, x_route)
        parts = (routing.route, routing.weight, mask, edited.before, edited.after, size)
        self._reads.append(_Read(*(part[0].detach() for part in parts)))
        return edited.x_route

    def report(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
    ) -> tuple[SteeredToken, ...]:
        """One row per token of the text; those that were not read have no block."""
        parts = [torch.cat(part).tolist() for part in zip(*self._reads, strict=True)]
        reads = [*zip(*parts, strict=True), *[None] * (len(ids) - self._n_seen)]
        tokens = []
        for position, (token_id, read) in enumerate(zip(ids, reads, strict=True)):
            token = cast(str, tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
            generated = position >= self._steerable.n_prompt
            if read is None:
                tokens.append(SteeredToken(token, token_id, generated, False, *[None] * 5))
            else:
                route, weight, steered, before, after, size = read
                block = self._handle.routed_blocks[route]
                edited = (steered, block, weight, tuple(before), tuple(after), size)
                tokens.append(SteeredToken(token, token_id, generated, *edited))
        return tuple(tokens)


def _relative_norm(
    edit: Float[Tensor, "... d"], x_route: Float[Tensor, "... d"]
) -> Float[Tensor, ...]:
    """|edit| / |x_route|, in which p and the stream's scale cancel; 0 for a constant stream."""
    norm = x_route.norm(dim=-1)
    return torch.where(norm > 0, edit.norm(dim=-1) / norm, 0.0)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, sae: RoutedSAEMixin, prompt: str, chat_template: bool
) -> tuple[list[int], int]:
    """The prompt's tokens, and how many of them a chat template puts before the user's text."""
    n_before = 0
    if chat_template and tokenizer.chat_template:
        ids = _templated(tokenizer, prompt)
        # a text that begins with another letter makes a difference from the user's text on
        other = _templated(tokenizer, "b" if prompt.strip()[:1] == "a" else "a")
        pairs = enumerate(zip(ids, other, strict=False))
        n_before = next((i for i, (a, b) in pairs if a != b), len(ids))
    else:
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        bos = tokenizer.bos_token_id
        # as SAELens's store begins a context; an SAE without that metadata has None
        wants_bos = sae.cfg.metadata.prepend_bos in (None, True)
        if wants_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
    if not ids:
        raise UserError(f"prompt={prompt!r}: has no tokens, so there is nothing to continue")
    return ids, n_before


def _templated(tokenizer: PreTrainedTokenizerBase, content: str) -> list[int]:
    turns = [{"role": "user", "content": content}]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template fails ({error}); leave it out (--no-chat-template, "
            "chat_template=False)"
        ) from error
    return list(tokenizer(cast(str, text), add_special_tokens=False)["input_ids"])
