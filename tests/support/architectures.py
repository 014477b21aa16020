"""Every routed architecture at a small size, and what its tests share."""

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_route import saes

# training class, its options, the class it is saved as
ARCHITECTURES = {
    "topk": (saes.RouteTopKTrainingSAE, {"k": 8}, saes.RouteTopKSAE),
    "batchtopk": (saes.RouteBatchTopKTrainingSAE, {"k": 8}, saes.RouteJumpReLUSAE),
    "matryoshka_batchtopk": (
        saes.RouteMatryoshkaBatchTopKTrainingSAE,
        {"k": 8},
        saes.RouteJumpReLUSAE,
    ),
    "jumprelu": (saes.RouteJumpReLUTrainingSAE, {}, saes.RouteJumpReLUSAE),
    "standard": (saes.RouteStandardTrainingSAE, {}, saes.RouteStandardSAE),
    "gated": (saes.RouteGatedTrainingSAE, {}, saes.RouteGatedSAE),
}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

STEPS, STEP_TOKENS = 50, 64


def training_config(architecture, **options):
    training_class, defaults, _ = ARCHITECTURES[architecture]
    config_class = getattr(saes, f"{training_class.__name__}Config")
    return config_class(**{**defaults, **options})


def streams_of(model, sae, tokens):
    """Residual streams [n, pos, L, d] by the names in the SAE's metadata."""
    names = sae.cfg.metadata.hook_names
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name] for name in names], dim=2)


def random_sae(architecture, d=6, d_sae=12, n_layers=3, seed=0, spread=1.0, **options):
    """A training SAE in float64 whose weights are all random; it uses every layer."""
    training_class, defaults, _ = ARCHITECTURES[architecture]
    if "k" in defaults:
        options = {"k": 3, **options}
    sizes = {"d_in": d, "d_sae": d_sae, "n_routed_layers": n_layers, "dtype": "float64"}
    options = {"decoder_norm_interval": 0, **options}
    sae = training_class(training_config(architecture, **sizes, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(generator=generator)
            if name == "threshold":
                parameter.abs_()
            elif name == "r_mag":
                parameter.mul_(0.2)
        sae.W_enc /= d**0.5
        sae.W_dec /= 3
        sae.W_router.mul_(spread / d**0.5)
        if "topk_threshold" in dict(sae.named_buffers()):
            sae.topk_threshold.fill_(0.7)
    return sae


def random_streams(tokens, n_layers=3, d=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n_layers, d, generator=generator, dtype=torch.float64)
    return x * torch.arange(1, n_layers + 1).view(-1, 1) + 0.3


def encode_by_hand(sae, x):
    """The four encoders as their papers write them, from the weights of an SAE for inference."""
    centered = x - sae.b_dec
    if isinstance(sae, saes.RouteGatedSAE):
        gate = centered @ sae.W_enc + sae.b_gate
        size = centered @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
        return torch.where(gate > 0, size.clamp(min=0), torch.zeros_like(size))
    pre = centered @ sae.W_enc + sae.b_enc
    if isinstance(sae, saes.RouteJumpReLUSAE):
        return torch.where(pre > sae.threshold, pre.clamp(min=0), torch.zeros_like(pre))
    if isinstance(sae, saes.RouteTopKSAE):
        kept = pre >= pre.sort(dim=-1, descending=True).values[..., sae.cfg.k - 1 : sae.cfg.k]
        return torch.where(kept, pre.clamp(min=0), torch.zeros_like(pre))
    return pre.clamp(min=0)


def decode_by_hand(sae, feature_acts):
    return feature_acts @ sae.W_dec + sae.b_dec


def a_step(x, dead=None):
    return TrainStepInput(
        sae_in=x,
        coefficients={"l0": 0.01, "l1": 0.2},
        dead_neuron_mask=dead,
        n_training_steps=1,
        is_logging_step=False,
    )


def train(sae, batches, lr=2e-3):
    """SAELens's own trainer over prepared batches; the learning rate decays to 0."""
    n, tokens = len(batches), len(batches[0])
    config = SAETrainerConfig(
        total_training_samples=n * tokens,
        train_batch_size_samples=tokens,
        lr=lr,
        lr_end=0.0,
        lr_decay_steps=n // 2,
    )
    trainer = SAETrainer(config, sae, iter(batches))
    return trainer.fit()


def structured_streams(tokens, seed, n_layers=3, d=24, n_directions=40):
    """Four of 40 directions a token, the same ones at every block, each block with different noise.

    How strong the noise is differs from token to token and layer to layer: there is something for
    a router to choose.
    """
    fixed = torch.Generator().manual_seed(12345)
    directions = torch.randn(n_directions, d, generator=fixed) / d**0.5
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(tokens, n_directions, generator=generator).topk(4, dim=-1).indices
    sizes = 1 + torch.rand(tokens, 4, generator=generator)
    signal = torch.zeros(tokens, n_directions).scatter(-1, which, sizes) @ directions
    noise = torch.randn(tokens, n_layers, d, generator=generator) / d**0.5
    return signal.unsqueeze(1) + noise * torch.rand(tokens, n_layers, 1, generator=generator)
