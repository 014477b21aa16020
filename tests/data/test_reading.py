"""`activation_batches`: text as the SAEs were trained on it, one forward pass for all of them."""

import pytest
import torch
from datasets import Dataset
from support.small import TINYLLAMA_WIDTH, is_kept, small_config, tokens_dataset

from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.data.reading import activation_batches, kept_activations
from sae_lens_route.errors import UserError
from sae_lens_route.saes import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from sae_lens_route.training.runner import RouteSAETrainingRunner

EVERYTHING = 10**6
KEEPING = {
    "special tokens": {"exclude_special_tokens": True},
    "every token": {"exclude_special_tokens": False},
    "a custom list": {"exclude_special_tokens": [3, 5, 8, *range(100, 200)]},
    "positions": {"seqpos_slice": (1, 12), "exclude_special_tokens": False},
    "positions and special tokens": {"seqpos_slice": (1, 12)},
    "every other position and a list": {
        "seqpos_slice": (1, 12, 2),
        "exclude_special_tokens": [1, *range(300, 400)],
    },
}


def new_sae(blocks=(3, 4, 6), **metadata):
    """An SAE with random weights and the metadata that a run on the tiny Llama would write."""
    config = RouteTopKTrainingSAEConfig(
        d_in=TINYLLAMA_WIDTH, d_sae=96, k=8, n_routed_layers=len(blocks)
    )
    sae = RouteTopKTrainingSAE(config)
    sae.cfg.metadata.hook_name = f"blocks.{blocks[-1]}.route.hook_resid_post"
    sae.cfg.metadata.hook_names = [f"blocks.{block}.hook_resid_post" for block in blocks]
    sae.cfg.metadata.routed_blocks = list(blocks)
    for name, value in {
        "context_size": 16,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "seqpos_slice": (None,),
        **metadata,
    }.items():
        sae.cfg.metadata[name] = value
    return sae


@pytest.mark.parametrize("settings", KEEPING.values(), ids=KEEPING)
def test_training_and_reading_keep_the_same_tokens(tinyllama, settings):
    dataset = tokens_dataset(n_contexts=12)
    contexts = torch.as_tensor(dataset["tokens"][:])
    cfg = small_config(None, routed_blocks=[3, 4, 6], train_batch_size_tokens=10, **settings)
    runner = RouteSAETrainingRunner(cfg, dataset, tinyllama)
    names = [f"blocks.{block}.hook_resid_post" for block in (3, 4, 6)]
    _, cache = tinyllama.run_with_cache(contexts)
    whole = torch.stack([cache[name] for name in names], dim=2)
    expected = torch.stack(
        [
            whole[row, position]
            for row in range(12)
            for position in range(16)
            if is_kept(int(contexts[row, position]), position, **settings)
        ]
    )

    store = RoutedActivationsStore.from_config(tinyllama, cfg, dataset)
    trained_on = torch.cat([next(store) for _ in range(len(expected) // 10)])
    torch.testing.assert_close(trained_on, expected[: len(trained_on)], rtol=1e-5, atol=1e-5)

    sae = runner.run()
    batches = activation_batches(
        tinyllama, sae, dataset, max_tokens=EVERYTHING, batch_size=4, description=None
    )
    read = torch.cat(list(kept_activations(batches, sae)))
    torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-5)


def test_batches_are_the_streams_at_every_position(tinyllama):
    dataset = tokens_dataset(n_contexts=10)
    contexts = torch.as_tensor(dataset["tokens"][:])
    batches = list(activation_batches(tinyllama, new_sae(), dataset, batch_size=4))
    assert [len(batch.tokens) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), contexts)
    _, cache = tinyllama.run_with_cache(contexts)
    streams = torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in (3, 4, 6)], dim=2)
    read = torch.cat([batch.activations for batch in batches])
    torch.testing.assert_close(read, streams, rtol=1e-5, atol=1e-5)
    assert all(batch.blocks == (3, 4, 6) for batch in batches)


@pytest.mark.parametrize(("max_tokens", "n_contexts"), [(16 * 5 + 3, 5), (1, 1), (EVERYTHING, 10)])
def test_reading_ends_at_max_tokens_or_with_the_text(tinyllama, max_tokens, n_contexts):
    batches = activation_batches(
        tinyllama, new_sae(), tokens_dataset(n_contexts=10), max_tokens=max_tokens, batch_size=2
    )
    assert sum(len(batch.tokens) for batch in batches) == n_contexts


def test_token_ids_are_read_whole_and_like_a_dataset(tinyllama):
    dataset = tokens_dataset(n_contexts=10)
    contexts = torch.as_tensor(dataset["tokens"][:])
    sae = new_sae(seqpos_slice=(1, 12))
    from_ids = activation_batches(tinyllama, sae, contexts, max_tokens=16, batch_size=4)
    from_dataset = activation_batches(tinyllama, sae, dataset, batch_size=4)
    for ids, rows in zip(from_ids, from_dataset, strict=True):
        assert torch.equal(ids.tokens, rows.tokens) and torch.equal(ids.kept, rows.kept)
        assert torch.equal(ids.activations, rows.activations)


def test_several_saes_share_one_pass_and_each_gets_its_blocks(tinyllama):
    first, second = new_sae((2, 5)), new_sae((3, 5, 9))
    calls = []
    handle = tinyllama.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    try:
        (both,) = activation_batches(tinyllama, [first, second], tokens_dataset(4), batch_size=4)
    finally:
        handle.remove()
    assert len(calls) == 1
    assert both.blocks == (2, 3, 5, 9)
    for sae in (first, second):
        (alone,) = activation_batches(tinyllama, sae, tokens_dataset(4), batch_size=4)
        torch.testing.assert_close(both.of(sae), alone.activations, rtol=1e-6, atol=1e-6)


def test_the_progress_bar_counts_batches(tinyllama, capsys):
    texts = (tokens_dataset(10), torch.as_tensor(tokens_dataset(10)["tokens"][:]))
    for text in texts:
        batches = activation_batches(
            tinyllama, new_sae(), text, max_tokens=160, batch_size=4, description="evaluating"
        )
        assert len(list(batches)) == 3
        assert "evaluating: 100%" in capsys.readouterr().err


def test_text_is_packed_as_in_training(tinyllama):
    """Documents one per context, without a separator, if the SAE was trained so."""
    dataset = Dataset.from_dict({"text": ["one two three four five six seven eight nine ten"] * 6})
    for metadata in (
        {"disable_concat_sequences": True, "sequence_separator_token": "bos"},
        {"disable_concat_sequences": False, "sequence_separator_token": None},
        {"disable_concat_sequences": False, "sequence_separator_token": "eos"},
    ):
        cfg = small_config(None, context_size=8, store_batch_size_prompts=1, **metadata)
        cfg.resolve(tinyllama)
        trained_on = RoutedActivationsStore.from_config(tinyllama, cfg, dataset).get_batch_tokens(4)
        sae = new_sae(context_size=8, **metadata)
        (batch,) = activation_batches(tinyllama, sae, dataset, max_tokens=32, batch_size=4)
        assert torch.equal(batch.tokens, trained_on), metadata


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_size", 8),
        ("prepend_bos", False),
        ("exclude_special_tokens", [3]),
        ("seqpos_slice", (1, 12)),
    ],
)
def test_saes_that_read_text_differently_are_refused(tinyllama, field, value):
    saes = [new_sae(), new_sae(**{field: value})]
    with pytest.raises(UserError, match=f"the SAEs read text differently: {field} is .* or "):
        activation_batches(tinyllama, saes, tokens_dataset(4))


def test_a_slice_from_a_file_is_the_slice_of_the_run(tinyllama):
    saes = [new_sae(seqpos_slice=(1, 12)), new_sae(seqpos_slice=[1, 12])]
    assert next(activation_batches(tinyllama, saes, tokens_dataset(4))).blocks == (3, 4, 6)


def test_mistakes_are_named_before_the_model_runs(tinyllama):
    with pytest.raises(UserError, match=r"saes=\[\]: at least one SAE"):
        activation_batches(tinyllama, [], "demo")
    with pytest.raises(UserError, match="the dataset is empty"):
        activation_batches(tinyllama, new_sae(), Dataset.from_dict({"text": []}))
    with pytest.raises(UserError, match="Dataset must have a 'tokens', 'input_ids', 'text'"):
        activation_batches(tinyllama, new_sae(), Dataset.from_dict({"words": ["a"]}))
    with pytest.raises(UserError, match="context_size is required"):
        activation_batches(tinyllama, new_sae(context_size=None), tokens_dataset(4))
    without_hooks = new_sae()
    without_hooks.cfg.metadata.hook_names = None
    with pytest.raises(UserError, match="hook_names"):
        activation_batches(tinyllama, without_hooks, tokens_dataset(4))
