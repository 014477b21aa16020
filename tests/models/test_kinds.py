"""What differs between the kinds of model: blocks, sizes, names, block outputs, hook points."""

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from support.models import MODEL_CLASSES, random_tokens, residual_streams, small_folder
from support.small import TINYLLAMA
from torch import Tensor

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import (
    context_length,
    decoder_blocks,
    default_routed_blocks,
    hook_point_home,
    residual_hook_names,
    residual_of,
    token_embedding,
    tokenizer_of,
    with_residual,
)
from sae_lens_route.models.load import load_model


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_the_output_of_each_decoder_block_is_the_residual_stream(kind: str) -> None:
    model = load_model(TINYLLAMA, kind)
    seen: list[Tensor] = []
    for block in decoder_blocks(model):
        block.register_forward_hook(lambda _m, _i, output: seen.append(residual_of(output)))
    streams = residual_streams(model, random_tokens(8))
    assert torch.equal(torch.stack(seen), streams)


def test_default_routed_blocks_are_the_middle_half() -> None:
    assert default_routed_blocks(16) == list(range(3, 12))
    assert {n: default_routed_blocks(n) for n in (1, 2, 3, 4, 7, 8)} == {
        1: [0],
        2: [0],
        3: [0, 1],
        4: [0, 1, 2],
        7: [0, 1, 2, 3, 4],
        8: [1, 2, 3, 4, 5],
    }
    for n in range(1, 100):
        blocks = default_routed_blocks(n)
        assert 0 <= blocks[0] <= blocks[-1] < n
    with pytest.raises(ValueError, match="n_layers=0"):
        default_routed_blocks(0)


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_blocks_outside_the_model(kind: str) -> None:
    model = load_model(TINYLLAMA, kind)
    for blocks in ([3, 16], [-1]):
        with pytest.raises(ValueError, match=r"routed_blocks=\[.*blocks 0 to 15"):
            residual_hook_names(model, blocks)


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_hook_names_are_as_the_model_spells_them(kind: str) -> None:
    name = {
        "HookedTransformer": "blocks.3.hook_resid_post",
        "TransformerBridge": "blocks.3.hook_out",
        "AutoModelForCausalLM": "model.layers.3",
    }[kind]
    assert residual_hook_names(load_model(TINYLLAMA, kind), [3]) == [name]


def test_the_stream_in_a_tuple_or_alone() -> None:
    x, y, rest = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), ("cache",)
    assert residual_of(x) is x and residual_of((x, *rest)) is x
    assert with_residual(x, y) is y
    assert with_residual((x, *rest), y) == (y, "cache")


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_embedding_tokenizer_and_context(kind: str, tmp_path) -> None:
    model = load_model(str(small_folder(tmp_path / "m", "Llama")), kind)
    embedded: list[Tensor] = []
    handle = token_embedding(model).register_forward_hook(lambda _m, _i, out: embedded.append(out))
    model(random_tokens(8))
    handle.remove()
    assert [x.shape for x in embedded] == [(2, 8, 32)]
    assert context_length(model) == 256
    assert tokenizer_of(model).encode("x = 1", add_special_tokens=False) == [89, 222, 30, 222, 18]
    model.tokenizer = None
    with pytest.raises(UserError, match=r"model\.tokenizer is None"):
        tokenizer_of(model)


@pytest.mark.parametrize("kind", MODEL_CLASSES)
@pytest.mark.parametrize("end", ["route.hook_resid_post", "hook_resid_route"])
def test_a_hook_point_is_added_and_removed_without_a_trace(kind: str, end: str) -> None:
    model = load_model(TINYLLAMA, kind)
    block, name = decoder_blocks(model)[3], f"blocks.3.{end}"
    modules, hooks = [n for n, _ in model.named_modules()], list(model.hook_dict)
    home = hook_point_home(model, block, name)
    home.add()
    hook_point = model.hook_dict[name]
    assert home.get() is hook_point and hook_point.name == name
    assert list(model.hook_dict) != hooks
    with pytest.raises(UserError, match=f"hook_name='{name}' is taken"):
        hook_point_home(model, block, name)
    home.remove()
    assert list(model.hook_dict) == hooks
    assert [n for n, _ in model.named_modules()] == modules


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_names_for_a_hook_point_that_cannot_be_used(kind: str) -> None:
    model = load_model(TINYLLAMA, kind)
    block = decoder_blocks(model)[3]
    for name in ("blocks.3", "blocks.3.a.b.hook"):
        with pytest.raises(UserError, match=f"hook_name='{name}': must be blocks.N.NAME or"):
            hook_point_home(model, block, name)
    if not isinstance(model, HookedProxyLM):  # whose blocks get no attribute
        with pytest.raises(UserError, match=r"hook_name='blocks\.3\.mlp\.hook_x' is taken"):
            hook_point_home(model, block, "blocks.3.mlp.hook_x")
