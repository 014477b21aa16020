"""One feature steered, chosen by rule (the paper's Figure 10).

1. *Candidates.* The features that fire on a few words and on few tokens, strongest first: whether
   steering one works can be read off the text.
2. *Tried.* Each is set to several multiples of its maximum while the model continues the same
   prompt, the beginning of the held-out text.
3. *Chosen.* Of the texts that do not repeat themselves, and whose edits are smaller than the
   streams they change, the one that uses the feature's words most, and more often than the clean
   text does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from sae_lens_route.features.table import FeatureTable
from sae_lens_route.models.kinds import LanguageModel, tokenizer_of
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.steering import FeatureEdit, steer
from sae_lens_route.steering.steer import SteeringResult

_CANDIDATES, _MULTIPLES = 8, (0.5, 1.0, 1.5, 2.0)
_MAX_CLASSES, _MAX_DENSITY = 8, 0.05
_PROMPT_CHARACTERS, _NEW_TOKENS = 80, 40
_LEAST_DISTINCT = 0.5
"""Of a text's pairs of neighboring tokens, the least share that occur once."""


@dataclass(frozen=True)
class SteeringExample:
    """A feature's edit and what it does to a text."""

    feature: int
    words: list[str]
    """Token classes that it fires on."""
    edit: str
    """As the command line takes it."""
    prompt: str
    clean_text: str
    steered_text: str
    n_clean: int
    """Uses of the words in the clean text."""
    n_steered: int
    """The same in the steered text."""
    largest_size: float
    """Of an edit, relative to the stream that it changes."""


def steering_example(
    model: LanguageModel, sae: RoutedSAEMixin, table: FeatureTable, text: str
) -> SteeringExample | None:
    """The steering that the rule chooses; None if no candidate changes the text as it should.

    Args:
        model: The language model.
        sae: A RouteSAE of it.
        table: Its features and contexts, in units of n(x).
        text: Held-out text, whose beginning is the prompt.
    """
    if not text.strip():
        return None
    prompt = text[:_PROMPT_CHARACTERS].rsplit(maxsplit=1)[0]
    examples = []
    for feature, words in tqdm(_candidates(table).items(), "steering features"):
        maxima = {feature: table.profile(feature).max_activation}
        for multiple in _MULTIPLES:
            edit = f"{feature}:set:{multiple:g}x"
            result = steer(
                model,
                sae,
                prompt,
                FeatureEdit.parse(edit),
                maxima=maxima,
                max_new_tokens=_NEW_TOKENS,
                chat_template=False,
            )
            if result.warning is None and _distinct(_tokens(model, result.text)) >= _LEAST_DISTINCT:
                examples.append(_example(model, result, feature, words, edit))
    working = [example for example in examples if example.n_steered > example.n_clean]
    return max(working, key=lambda example: example.n_steered - example.n_clean, default=None)


def _candidates(table: FeatureTable) -> Mapping[int, list[str]]:
    """Features by the rule's order, with the token classes they fire on that hold a word."""
    profiles = [
        profile
        for profile in map(table.profile, table.interpretable)
        if profile.n_classes <= _MAX_CLASSES and profile.density <= _MAX_DENSITY
    ]
    words = {
        profile.feature: sorted(
            {
                _class(context.token)
                for context in table.contexts_of(profile.feature)
                if re.fullmatch(r"\w{3,}", _class(context.token))
            }
        )
        for profile in sorted(profiles, key=lambda profile: -profile.max_activation)
    }
    return dict([(f, w) for f, w in words.items() if w][:_CANDIDATES])


def _example(
    model: LanguageModel, result: SteeringResult, feature: int, words: list[str], edit: str
) -> SteeringExample:
    def uses(text: str) -> int:
        return sum(token in words for token in _tokens(model, text))

    return SteeringExample(
        feature,
        words,
        edit,
        result.prompt,
        result.clean_text,
        result.text,
        uses(result.clean_text),
        uses(result.text),
        max(token.relative_size or 0.0 for token in result.tokens),
    )


def _tokens(model: LanguageModel, text: str) -> list[str]:
    tokenizer: Any = tokenizer_of(model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [_class(tokenizer.decode([i])) for i in ids]


def _class(token: str) -> str:
    return token.strip().lower()


def _distinct(tokens: Sequence[str]) -> float:
    pairs = list(itertools.pairwise(tokens))
    return len(set(pairs)) / len(pairs) if pairs else 0.0
