"""SAELens's and TransformerLens's tools at the routed hook."""

import math

import pytest
import torch
from datasets import Dataset
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import (
    extract_layer_from_tlens_hook_name,
    extract_stop_at_layer_from_tlens_hook_name,
)
from support.splice import (
    KINDS,
    brute_force,
    close,
    hook_of,
    route_sae,
    run,
    some_tokens,
)
from transformer_lens.hook_points import HookPoint

from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [2, 3, 5]
NAME = "blocks.5.route.hook_resid_post"


@pytest.mark.parametrize("name", [NAME, "blocks.5.stack.hook_resid_post"])
def test_saelens_reads_block_and_stop_off_the_name(name):
    assert extract_layer_from_tlens_hook_name(name) == 5
    assert extract_stop_at_layer_from_tlens_hook_name(name) == 6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("proxy")])
def test_an_sae_is_added_and_reset_at_the_hook_point(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, acts_name = run(model, tokens), f"{NAME}.hook_sae_acts_post"

    def clamp(acts):
        acts = acts.clone()
        acts[..., 3] = 4.0
        return acts

    def splice(edit):
        def f(value):
            return sae.decode(edit(sae.encode(value)))

        return brute_force(model, sae, ROUTED, f, lambda: run(model, tokens))[0]

    expected, expected_clamped = splice(lambda acts: acts), splice(clamp)
    with attach(model, sae) as handle:
        model.add_sae(sae)
        assert handle.hook_point.sae is sae
        close(run(model, tokens), expected)
        assert acts_name in model.run_with_cache(tokens)[1]
        hooks = [(acts_name, hook_of(clamp))]
        close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected_clamped)
        model.reset_saes()
        assert isinstance(model.hook_dict[NAME], HookPoint)
        assert torch.equal(run(model, tokens), clean)
        close(model.run_with_saes(tokens, saes=[sae]), expected)
        assert torch.equal(run(model, tokens), clean)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("llama")])
def test_run_evals_with_everything_on(make_model, kind):
    model, sae = make_model(kind), route_sae(ROUTED)
    metadata = {"context_size": 12, "prepend_bos": True, "dataset_path": "none"}
    for field, value in metadata.items():
        sae.cfg.metadata[field] = value
    tokens = some_tokens(40, 12)
    tokens[:, 0] = 0
    store = {
        "dataset": Dataset.from_dict({"tokens": tokens.tolist()}),
        "streaming": False,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 2,
        "train_batch_size_tokens": 12,
    }
    with attach(model, sae) as handle:
        metrics, features = run_evals(
            sae,
            ActivationsStore.from_sae(model, sae, **store),
            model,
            ActivationScaler(),
            get_eval_everything_config(
                batch_size_prompts=4,
                n_eval_reconstruction_batches=2,
                n_eval_sparsity_variance_batches=2,
            ),
            exclude_special_tokens=[0, 1],
        )
        assert handle.routing is not None
    numbers = {name: value for group in metrics.values() for name, value in group.items()}
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["kl_div_with_sae"] > 0.01
    assert numbers["kl_div_with_ablation"] > 0.01
    assert numbers["l0"] <= sae.cfg.k
    assert len(features["feature_density"]) == sae.cfg.d_sae
