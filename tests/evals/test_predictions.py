"""The comparison of predictions in pieces against plain computations in float64."""

import pytest
import torch

from sae_lens_route.evals import predictions
from sae_lens_route.evals.predictions import CleanPass
from sae_lens_route.models.kinds import decoder_blocks


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def in_float64(clean, other, tokens):
    p, q = (logits.double().log_softmax(-1) for logits in (clean, other))
    kl = (p.exp() * (p - q)).sum(-1)
    ce = -q[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return kl, ce


def test_real_logits_in_pieces(tinyllama, monkeypatch):
    """Float32 log probabilities of 512 words, summed: 1e-5 relative, 1e-7 absolute."""
    tokens = torch.randint(2, 512, (3, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(predictions, "_PIECE", 5 * 512)
    clean = CleanPass(tinyllama, tokens)
    comparison, streams = clean.edited({2: lambda x: 1.1 * x, 5: lambda x: x - 0.1})
    handles = [
        decoder_blocks(tinyllama)[2].register_forward_hook(lambda _m, _a, x: 1.1 * x),
        decoder_blocks(tinyllama)[5].register_forward_hook(lambda _m, _a, x: x - 0.1),
    ]
    other = tinyllama(tokens, return_type="logits")
    for handle in handles:
        handle.remove()
    kl, ce = in_float64(tinyllama(tokens, return_type="logits"), other, tokens)
    torch.testing.assert_close(comparison.kl, kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(comparison.ce, ce, rtol=1e-6, atol=1e-6)
    assert comparison.kl.dtype == torch.float64 and kl.min() > 1e-6
    assert set(streams) == {2, 5}


def test_the_ablated_pass_is_run_once_for_the_same_places(tinyllama):
    tokens = torch.randint(2, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    clean, passes = CleanPass(tinyllama, tokens), []
    handle = tinyllama.register_forward_pre_hook(lambda *_: passes.append(1))
    here = torch.zeros(2, 8, 2, dtype=torch.bool)
    here[:, 3, 0] = True
    first = clean.ablated([2, 5], here)
    assert clean.ablated([2, 5], here.clone()) is first and len(passes) == 1
    more = here.clone()
    more[:, 4, 1] = True
    other = clean.ablated([2, 5], more)
    assert len(passes) == 2
    handle.remove()
    assert torch.equal(first.kl[:, :3], torch.zeros(2, 3).double())
    assert not torch.equal(first.kl, other.kl)
