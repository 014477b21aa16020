"""On the demo model, clamping a feature makes the tokens more probable that follow it in text."""

import math
import random

import pytest
import torch

from sae_lens_route.data.reading import activation_batches
from sae_lens_route.demo import demo_config
from sae_lens_route.models.names import DEMO_FOLDER
from sae_lens_route.splice import attach
from sae_lens_route.steering import (
    FeatureEdit,
    default_clamp,
    edit_features,
)
from sae_lens_route.training.runner import RouteSAETrainingRunner

pytestmark = pytest.mark.usefixtures("no_gradients")

N_FEATURES, N_TOP = 40, 10


def sign_test(n_raised, n):
    """Probability of as many or more if a rise were as likely as a fall."""
    return sum(math.comb(n, i) for i in range(n_raised, n + 1)) / 2**n


@pytest.fixture(scope="module")
def demo():
    """The demo model, a RouteSAE trained on it for a few steps, and held-out contexts."""
    if not (DEMO_FOLDER / "config.json").is_file():
        pytest.skip("the demo model is not built yet")
    cfg = demo_config("", training_tokens=60_000)
    cfg.output_path, cfg.checkpoint_path, cfg.n_checkpoints = None, None, 0
    runner = RouteSAETrainingRunner(cfg)
    with torch.enable_grad():
        sae = runner.run().requires_grad_(False)
    batches = activation_batches(runner.model, sae, "demo:heldout", max_tokens=4 * 256)
    heldout = torch.cat([batch.tokens for batch in batches])
    return runner.model, sae, heldout


@pytest.fixture(scope="module")
def next_tokens(demo):
    """Feature -> the tokens that typically follow it, for 40 features that fire often.

    They are statistics of training text, without any model output: the tokens v that follow the
    strongest quarter of the feature's activations, by their share in the divergence from the base
    rate, P(v | feature) log(P(v | feature) / P(v)).
    """
    model, sae, _ = demo
    acts, following = [], []
    with torch.no_grad():
        for batch in activation_batches(model, sae, "demo:train", max_tokens=24_000):
            kept = batch.kept[:, :-1]
            acts.append(sae.encode_layers(batch.of(sae))[:, :-1][kept])
            following.append(batch.tokens[:, 1:][kept])
    acts, following = torch.cat(acts), torch.cat(following)
    n_vocab = model.cfg.d_vocab
    base = following.bincount(minlength=n_vocab) / len(following)
    often = ((acts > 0).sum(0) >= 100).nonzero().flatten().tolist()
    typical = {}
    for feature in random.Random(0).sample(often, N_FEATURES):
        z = acts[:, feature]
        strong = z >= z[z > 0].quantile(0.75)
        rate = following[strong].bincount(minlength=n_vocab) / strong.sum()
        share = torch.where(rate > 0, rate * (rate / base).log(), 0.0)
        typical[feature] = share.topk(N_TOP).indices
    return typical


def mass(logits, tokens):
    """Probability of the token set. Not its logarithm: that rises for tokens of other features too
    (42 of 48), because a disturbed model is less sure of everything."""
    return logits.softmax(-1)[..., tokens].sum(-1)


def rises(model, sae, edit, tokens, steered, of):
    """Mean rise of the mass of each token set in `of`, at the steered positions."""
    clean = model(tokens)
    with attach(model, sae) as handle:
        hook = edit_features(handle, edit, steered)
        logits = model.run_with_hooks(tokens, fwd_hooks=[(handle.name, hook)])
    return [float((mass(logits, ids) - mass(clean, ids))[steered].mean()) for ids in of]


def test_clamping_raises_a_features_next_tokens_on_prompts(demo, next_tokens):
    model, sae, heldout = demo
    tokens = heldout[:4, :48]
    steered = tokens > 1  # neither BOS nor EOS
    typical, other = [], []
    for feature, following in next_tokens.items():
        strangers = next_tokens[random.Random(feature).choice([*next_tokens.keys() - {feature}])]
        edit = FeatureEdit(feature, "set", default_clamp(sae.cfg.d_in))
        rise = rises(model, sae, edit, tokens, steered, of=(following, strangers))
        typical.append(rise[0])
        other.append(rise[1])
    n_raised, n_others = sum(r > 0 for r in typical), sum(r > 0 for r in other)
    n_more = sum(a > b for a, b in zip(typical, other, strict=True))
    n, mean, mean_other = len(typical), sum(typical) / len(typical), sum(other) / len(other)
    print(f"prompts: a feature's tokens rise for {n_raised} of {n}, mean {mean:.4f}")
    print(f"another feature's: for {n_others}, mean {mean_other:.4f}; less: {n_more}")
    assert len(typical) >= 20
    assert sign_test(n_raised, len(typical)) < 0.01 and sign_test(n_more, len(typical)) < 0.01


def test_clamping_raises_a_features_next_tokens_on_generated_text(demo, next_tokens):
    """Generated tokens are steered, prompts are not."""
    model, sae, heldout = demo
    prompts, n_new = heldout[:4, :16], 9
    typical = []
    for feature, following in next_tokens.items():
        edit = FeatureEdit(feature, "set", default_clamp(sae.cfg.d_in))
        with attach(model, sae) as handle:
            hook_function = edit_features(handle, edit)

            def while_writing(x, hook, hook_function=hook_function):
                return hook_function(x) if x.shape[1] == 1 else x

            with model.hooks(fwd_hooks=[(handle.name, while_writing)]):
                tokens = model.generate(
                    prompts,
                    max_new_tokens=n_new,
                    do_sample=False,
                    stop_at_eos=False,
                    return_type="tokens",
                    verbose=False,
                )
        steered = torch.zeros_like(tokens, dtype=torch.bool)
        steered[:, prompts.shape[1] : -1] = True
        typical += rises(model, sae, edit, tokens, steered, of=(following,))
    n_raised = sum(r > 0 for r in typical)
    n, mean = len(typical), sum(typical) / len(typical)
    print(f"generated: a feature's tokens rise for {n_raised} of {n}, mean {mean:.4f}")
    assert len(typical) >= 20 and sign_test(n_raised, len(typical)) < 0.01
