"""A RouteSAE, a crosscoder and the reference's SAE, each with the model it reads."""

import functools

import pytest
import torch
from sae_lens import SAE
from support.golden import golden_sae, load
from support.small import TINYLLAMA, TINYLLAMA_WIDTH, small_config

from sae_lens_route.models.kinds import residual_hook_names
from sae_lens_route.models.load import load_model
from sae_lens_route.saes import TopKCrosscoder, TopKCrosscoderConfig
from sae_lens_route.training.runner import RouteSAETrainingRunner


class NoReLUTopK(torch.nn.Module):
    """The reference keeps negative latents; SAELens's TopK sets them to zero."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        top = x.topk(self.k, dim=-1)
        return torch.zeros_like(x).scatter(-1, top.indices, top.values)


@pytest.fixture(params=[0, 1], ids=lambda seed: f"seed{seed}")
def lm_golden(request):
    """Model, SAE, tensors and numbers of the reference implementation."""
    tensors, info = load(f"seed{request.param}_lm")
    model = load_model(TINYLLAMA, "AutoModelForCausalLM")
    # the reference counts padding too, so the attention at padding matters: pass its mask
    mask = tensors["attention_mask"]
    model.model.forward = functools.partial(model.model.forward, attention_mask=mask)
    sae = golden_sae(tensors, info, aggregation=info["aggre"], routing=info["routing"])
    sae.activation_fn = NoReLUTopK(info["k"])
    sae.cfg.metadata.hook_name = "blocks.11.route.hook_resid_post"
    sae.cfg.metadata.hook_names = residual_hook_names(model, list(range(3, 12)))
    return model, sae, tensors, info


@pytest.fixture(scope="session")
def route_sae(tinyllama, tmp_path_factory):
    """A RouteSAE of blocks 3 to 11 after 30 steps."""
    folder = tmp_path_factory.mktemp("run") / "sae"
    cfg = small_config(folder, training_tokens=64 * 30)
    RouteSAETrainingRunner(cfg, override_model=tinyllama).run()
    return SAE.load_from_disk(folder)


@pytest.fixture(scope="session")
def crosscoder(route_sae):
    """A random crosscoder of blocks that leave a gap."""
    torch.manual_seed(5)
    width = 3 * TINYLLAMA_WIDTH
    sae = TopKCrosscoder(TopKCrosscoderConfig(d_in=width, d_sae=128, k=8, n_routed_layers=3))
    for weight in (sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(weight, std=width**-0.5)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    metadata = route_sae.cfg.metadata
    sae.cfg.metadata = type(metadata)(**metadata.to_dict())
    sae.cfg.metadata.routed_blocks = [3, 4, 6]
    sae.cfg.metadata.hook_names = [f"blocks.{i}.hook_resid_post" for i in (3, 4, 6)]
    sae.cfg.metadata.hook_name = "blocks.6.stack.hook_resid_post"
    return sae
