"""The splice against the reference implementation's numbers."""

import pytest
import torch
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from support.golden import FOLDER, golden_sae, load
from support.splice import (
    OnlyBlocks,
    close,
    hook_of,
    run,
    tensor,
    with_hooks,
)

from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.models.load import load_model
from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")


def reference_codec(sae, edit=lambda latents: latents):
    """The reference's encode and decode: its top-k keeps negative values (no ReLU)."""

    def f(value):
        top = ((value - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(sae.cfg.k)
        latents = torch.zeros(*value.shape[:-1], sae.cfg.d_sae).scatter(-1, *top[::-1])
        return sae.decode(edit(latents))

    return f


class Recited(torch.nn.Module):
    """A block whose output is a given stream, whatever its input."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def forward(self, hidden_states):
        return self.stream


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("golden", ["splice", "splice_steer"])
def test_reference_splice_of_given_streams(seed, golden):
    tensors, info = load(f"seed{seed}_route")
    streams = tensors["x_raw"][0].movedim(-2, 0)
    blocks = [Recited(stream) for stream in streams]
    model = HookedProxyLM(OnlyBlocks(blocks, streams.shape[-1]), None)
    sae = golden_sae(tensors, info)
    sae.cfg.metadata = SAEMetadata(
        hook_name="blocks.8.route.hook_resid_post", hook_names=[f"layers.{i}" for i in range(9)]
    )

    def steer(latents):
        for name, sign in (("set_high", 1), ("set_low", -1)):
            for latent, value, mode in info["steer"][name]:
                if mode == 0:
                    latents[..., latent] += sign * value
                else:
                    latents[..., latent] *= value**sign
        return latents

    codec = reference_codec(sae, steer) if golden == "splice_steer" else reference_codec(sae)
    outputs = {}

    def make_hook(i):
        def hook(module, args, output):
            outputs[i] = output
            if i == 1:  # the first routed block is not replayed, its edited output comes in here
                outputs[0] = args[0]

        return hook

    with attach(model, sae, unscaled=True) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(codec))
        with_hooks(model.model.layers, make_hook, lambda: model.model(streams[0]))
    spliced = torch.stack([outputs[i] for i in range(9)], -2)
    close(spliced, tensors[f"hard_sum.{golden}"], 1e-5)


LM_KINDS = ["AutoModelForCausalLM", "HookedTransformer"]
if has_transformer_bridge():
    LM_KINDS.append("TransformerBridge")


@pytest.fixture(scope="module")
def load_tinyllama():
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = load_model(str(FOLDER / "tinyllama"), kind)
        return made[kind]

    return make


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", LM_KINDS)
def test_reference_metrics_of_a_language_model(load_tinyllama, kind, seed):
    """KL, delta CE and the parts of the recovered loss, all to 5e-4.

    Padded tokens are compared for the Hugging Face model only: other kinds treat them differently.
    """
    tensors, info = load(f"seed{seed}_lm")
    model, sae = load_tinyllama(kind), golden_sae(tensors, info)
    routed = list(range(3, 12))
    sae.cfg.metadata = SAEMetadata(
        hook_name="blocks.11.route.hook_resid_post",
        hook_names=[f"blocks.{b}.hook_resid_post" for b in routed],
    )
    tokens, mask = tensors["input_ids"], tensors["attention_mask"]
    proxy = kind == "AutoModelForCausalLM"
    counted = torch.ones_like(mask) if proxy else mask
    counted = counted.bool()

    def logits():
        return run(model, tokens, mask if proxy else None)

    original = logits()
    with attach(model, sae, unscaled=True) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(reference_codec(sae)))
        reconstructed = logits()
        layer = handle.routing.route
        assert torch.equal(layer[counted], tensors["argmax_layer"][counted])
        close(handle.routing.probs[counted], tensors["router_weights"][counted], 1e-4)

    def ablate(i):
        def hook(module, args, output):
            here = (layer == i - 3).unsqueeze(-1)
            x = tensor(output).masked_fill(here, 0.0)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    zeroed = with_hooks(decoder_blocks(model), ablate, logits)

    for ours, theirs in ((original, "original"), (reconstructed, "reconstruct"), (zeroed, "zero")):
        for i, position in enumerate(info["logit_positions"]):
            rows = counted[:, position]
            close(ours[rows, position], tensors[f"logits_{theirs}.slice"][rows, i], 5e-4)

    p, q = original.log_softmax(-1), reconstructed.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    expected_kl = tensors["derived.kl_per_token"]
    assert (kl - expected_kl)[counted].abs().max() < 5e-4 * expected_kl.max()

    def cross_entropy(logits):
        targets, use = tokens[:, 1:], counted[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].movedim(-1, 1), targets, reduction="none"
        )
        return float(loss[use].double().mean())

    delta = cross_entropy(reconstructed) - cross_entropy(original)
    if proxy:
        metrics, parts = info["reference_metrics"], info["components_float64_from_reference_logits"]
        assert float(kl.sum()) / len(tokens) == pytest.approx(metrics["KLDiv"], rel=5e-4)
        assert delta == pytest.approx(metrics["DeltaCE"], rel=5e-4)
        assert cross_entropy(original) == pytest.approx(parts["ce_original"], rel=5e-4)
        assert cross_entropy(reconstructed) == pytest.approx(parts["ce_reconstruct"], rel=5e-4)
        assert cross_entropy(zeroed) == pytest.approx(parts["ce_zero"], rel=5e-4)
    else:
        masked = info["derived_masked_not_in_reference"]
        real = float(kl[mask.bool()].mean())
        assert real == pytest.approx(masked["kl_mean_per_real_token"], rel=5e-4)
        assert delta == pytest.approx(masked["delta_ce_masked"], rel=5e-4)
