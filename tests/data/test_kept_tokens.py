"""The one rule of which tokens take part."""

import pytest
import torch
from support.small import TINYLLAMA_SPECIAL

from sae_lens_route import RouteTopKTrainingSAEConfig
from sae_lens_route.data.kept_tokens import KeptTokens, excluded_token_ids
from sae_lens_route.errors import UserError
from sae_lens_route.saes import RouteTopKTrainingSAE

TOKENS = torch.tensor([[0, 7, 8, 1, 7], [7, 7, 0, 9, 1]])


def sae_with(**metadata):
    sae = RouteTopKTrainingSAE(RouteTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2, n_routed_layers=2))
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    return sae


def test_true_means_the_special_tokens_of_the_tokenizer(tinyllama):
    assert excluded_token_ids(True, tinyllama.tokenizer) == TINYLLAMA_SPECIAL


@pytest.mark.parametrize(("field", "ids"), [(False, []), (None, []), ([9, 7], [7, 9])])
def test_anything_else_needs_no_tokenizer(field, ids):
    assert excluded_token_ids(field, None) == ids


def test_special_tokens_without_a_tokenizer_are_an_error():
    with pytest.raises(UserError, match="exclude_special_tokens=True: the model has no tokenizer"):
        excluded_token_ids(True, None)


@pytest.mark.parametrize(
    ("rule", "excluded"),
    [
        (KeptTokens(), set()),
        (KeptTokens((7, 1)), {(0, 1), (0, 3), (0, 4), (1, 0), (1, 1), (1, 4)}),
        (KeptTokens((), (1, 4)), {(0, 0), (1, 0), (0, 4), (1, 4)}),
        (KeptTokens((), (1, -1)), {(0, 0), (1, 0), (0, 4), (1, 4)}),
        (KeptTokens((), (0, 5, 2)), {(0, 1), (1, 1), (0, 3), (1, 3)}),
        (KeptTokens((8,), (2, None)), {(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)}),
    ],
)
def test_ids_and_positions_are_excluded(rule, excluded):
    kept = rule.mask(TOKENS)
    assert {(int(row), int(pos)) for row, pos in (~kept).nonzero()} == excluded


def test_new_tokens_of_a_generation_have_the_mask_they_have_in_the_whole_context():
    rule = KeptTokens((7,), (1, 4))
    whole = rule.mask(TOKENS)
    for first in range(5):
        assert torch.equal(rule.mask(TOKENS[:, first:], first), whole[:, first:])


def test_an_sae_keeps_what_its_metadata_says(tinyllama):
    special = KeptTokens.of(sae_with(exclude_special_tokens=True), tinyllama.tokenizer)
    assert special == KeptTokens(tuple(TINYLLAMA_SPECIAL), (None,))
    listed = KeptTokens.of(sae_with(exclude_special_tokens=[5, 3], seqpos_slice=[1, 12]), None)
    assert listed == KeptTokens((3, 5), (1, 12))
    assert KeptTokens.of(sae_with(), None) == KeptTokens()
