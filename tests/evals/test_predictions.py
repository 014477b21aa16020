"""The comparison of predictions in pieces against plain computations in float64."""

import pytest
import torch
from support.command_line import TINYLLAMA

from sae_lens_route import load_model
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


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"])
def test_blocks_before_the_first_edit_run_once(kind):
    """A second edited pass begins at the first edit, and is bit for bit a pass of its own."""
    model = load_model(TINYLLAMA, kind)
    tokens = torch.randint(2, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    edits = {2: lambda x: 1.1 * x, 5: lambda x: x - 0.1}
    clean, ran = CleanPass(model, tokens), []
    whole, whole_streams = clean.edited(edits)
    blocks = decoder_blocks(model)
    forwards = [vars(block).get("forward") for block in blocks]
    handles = [
        part.register_forward_hook(lambda *_args, i=i: ran.append(i))
        for i, block in enumerate(blocks)
        for part in list(block.children())[-1:]
    ]
    again, streams = clean.edited(edits)
    for handle in handles:
        handle.remove()
    assert ran == list(range(3, len(blocks)))
    assert torch.equal(again.kl, whole.kl) and torch.equal(again.ce, whole.ce)
    assert all(torch.equal(streams[block], whole_streams[block]) for block in edits)
    assert [vars(block).get("forward") for block in blocks] == forwards
    unedited, _ = clean.edited({7: lambda x: x})
    assert unedited.kl.abs().max() < 1e-6


def test_divergences_over_a_large_vocabulary():
    """KL of float32 probabilities of 49,152 words, from near 0 to 2 nats: 5e-7 absolute."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 49_152, generator=generator)
    other = logits + torch.logspace(-3, 0, 64).unsqueeze(1) * torch.randn(
        logits.shape, generator=generator
    )
    tokens = torch.randint(49_152, (1, 64), generator=generator)

    class Model(torch.nn.Module):
        def forward(self, _tokens, return_type):
            return logits.unsqueeze(0)

    clean = CleanPass(Model(), tokens)
    kl, ce = in_float64(logits.unsqueeze(0), other.unsqueeze(0), tokens)
    comparison = clean._compared(other)
    torch.testing.assert_close(comparison.kl, kl, rtol=1e-6, atol=5e-7)
    torch.testing.assert_close(comparison.ce, ce, rtol=1e-6, atol=1e-6)
