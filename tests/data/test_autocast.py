"""`autocast_lm`: the model computes in bfloat16 autocast, and its streams are kept as they are."""

import pytest
import torch
from support.small import TINYLLAMA, small_config, tokens_dataset

from sae_lens_route.data.activations import RoutedActivationsStore, residual_streams
from sae_lens_route.models.load import load_model

BLOCKS = [3, 5, 7]
MODELS = {
    "hooked": {},
    "hugging face": {"model_class_name": "AutoModelForCausalLM"},
}


def store_of(model, mixing):
    cfg = small_config(
        None,
        routed_blocks=BLOCKS,
        exclude_special_tokens=False,
        autocast_lm=True,
        activations_mixing_fraction=mixing,
        n_batches_in_buffer=4,
    )
    cfg.resolve(model)
    return RoutedActivationsStore.from_config(model, cfg, override_dataset=tokens_dataset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_streams_keep_their_dtype_and_bits(options, dtype, mixing):
    model = load_model(TINYLLAMA, **options).to(dtype)
    store = store_of(model, mixing)
    n_tokens = store.layout.buffer_tokens or store.train_batch_size_tokens
    contexts = torch.tensor(tokens_dataset()["tokens"][:])[: n_tokens // 16]
    read = [
        residual_streams(model, batch, store.hook_names, autocast=True)
        for batch in contexts.split(store.store_batch_size_prompts)
    ]
    expected = torch.cat([torch.stack(streams, dim=2) for streams in read]).flatten(0, 1)
    assert {stream.dtype for streams in read for stream in streams} == {dtype}
    if dtype == torch.float32:
        full = residual_streams(model, contexts, store.hook_names)
        assert not torch.equal(torch.stack(full, dim=2).flatten(0, 1), expected)
        assert not torch.equal(expected.bfloat16().float(), expected)
    batch = next(iter(store.get_data_loader()))
    assert batch.dtype == dtype
    if mixing:
        rows = {tuple(row) for row in expected.flatten(1).tolist()}
        assert all(tuple(row) in rows for row in batch.flatten(1).tolist())
    else:
        assert torch.equal(batch, expected[: len(batch)])
