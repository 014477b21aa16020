"""The same tokens take part everywhere: training, evaluation, features, pages and steering."""

import numpy as np
import pytest
import torch
from support.small import is_kept, small_config, tokens_dataset

from sae_lens_route import activation_batches, evaluate, find_contexts, steer
from sae_lens_route.dashboards.collect import collect
from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.steering import FeatureEdit
from sae_lens_route.training.runner import RouteSAETrainingRunner

BLOCKS = [3, 4, 6]
RULES = {
    "special": {"exclude_special_tokens": True},
    "none": {"exclude_special_tokens": False},
    "custom": {"exclude_special_tokens": [7, 8, 9, 200]},
    "positions": {"seqpos_slice": (1, 12)},
    "custom and positions": {"exclude_special_tokens": [7, 8, 9], "seqpos_slice": (2, 10)},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_same_tokens_take_part(tinyllama, rule):
    dataset = tokens_dataset(n_contexts=12)
    contexts = torch.as_tensor(dataset["tokens"][:])
    kept = torch.tensor(
        [[is_kept(token, i, **rule) for i, token in enumerate(row)] for row in contexts.tolist()]
    )
    names = [f"blocks.{block}.hook_resid_post" for block in BLOCKS]
    _, cache = tinyllama.run_with_cache(contexts)
    streams = torch.stack([cache[name] for name in names], dim=2)

    cfg = small_config(None, routed_blocks=BLOCKS, train_batch_size_tokens=10, **rule)
    runner = RouteSAETrainingRunner(cfg, dataset, tinyllama)
    store = RoutedActivationsStore.from_config(tinyllama, cfg, dataset)
    trained_on = torch.cat([next(store) for _ in range(int(kept.sum()) // 10)])
    torch.testing.assert_close(trained_on, streams[kept][: len(trained_on)], rtol=1e-5, atol=1e-5)

    sae = runner.run()
    routing = sae.route(streams[kept])
    acts = sae.encode(routing.x_route)
    error = (sae.decode(acts) - routing.x_route).pow(2).sum(-1) / routing.x_route.pow(2).sum(-1)

    evaluation = evaluate(tinyllama, sae, contexts)
    assert evaluation.reconstruction.n_tokens == kept.sum()
    assert evaluation.reconstruction.norm_mse == pytest.approx(
        float(error.detach().mean()), rel=1e-4
    )
    assert evaluation.downstream is not None and evaluation.downstream.n_tokens == kept.sum()

    table = find_contexts(sae, activation_batches(tinyllama, sae, contexts), tinyllama.tokenizer)
    assert table.run.n_tokens == kept.sum()
    assert table.features["n_fired"].to_pylist() == (acts > 0).sum(0).tolist()

    assert np.array_equal(collect(tinyllama, sae, contexts).tokens.kept, kept.flatten().numpy())

    prompt = tinyllama.tokenizer.decode(contexts[1, 1:].tolist())
    edit = FeatureEdit(int(acts.sum(0).argmax()), "set", 5.0)
    steered = steer(tinyllama, sae, prompt, edit, max_new_tokens=6, chat_template=False)
    read = steered.tokens[:-1]  # the token written last is never read
    assert [token.steered for token in read] == [
        is_kept(token.token_id, i, **rule) for i, token in enumerate(read)
    ]
