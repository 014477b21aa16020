"""Small random crosscoders, and what they compute by explicit sums over blocks."""

import torch
from sae_lens.saes.sae import SAEMetadata, TrainStepInput

from sae_lens_route import saes

L, WIDTH, M, K = 3, 8, 40, 5
CLASSES = {
    "relu": (saes.Crosscoder, saes.CrosscoderConfig),
    "topk": (saes.TopKCrosscoder, saes.TopKCrosscoderConfig),
    "relu, training": (saes.TrainingCrosscoder, saes.TrainingCrosscoderConfig),
    "topk, training": (saes.TopKTrainingCrosscoder, saes.TopKTrainingCrosscoderConfig),
}


def crosscoder(kind="relu", layers=L, width=WIDTH, d_sae=M, seed=0, metadata=None, **options):
    """A crosscoder with random weights, biases and rows of many norms."""
    torch.manual_seed(seed)
    cls, config = CLASSES[kind]
    if kind.startswith("topk"):
        options = {"k": K, **options}
    cfg = config(
        d_in=layers * width,
        d_sae=d_sae,
        n_routed_layers=layers,
        dtype="float64",
        metadata=metadata or SAEMetadata(),
        **options,
    )
    sae = cls(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.W_enc /= (layers * width) ** 0.5
        sae.W_dec *= torch.rand(d_sae, 1) / (layers * width) ** 0.5
        sae.b_enc /= 4
        sae.b_dec /= 10
    return sae


def streams(n=11, layers=L, width=WIDTH, seed=1):
    """Residual streams of blocks that differ in scale and mean, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, layers, width, generator=generator, dtype=torch.float64)
    size = torch.tensor([3.0, 10.0, 40.0], dtype=torch.float64)[:layers, None]
    return x * size + size / 2


def explicit_normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def explicit_codes(sae, x):
    """Latents of streams [tokens, L, d], by a sum over blocks of one encoder each."""
    layers, width = x.shape[-2:]
    normed = explicit_normed(x)
    if sae.cfg.apply_b_dec_to_input:
        normed = normed - sae.b_dec.view(layers, width)
    pre = torch.einsum("tld,ldm->tm", normed, sae.W_enc.view(layers, width, -1)) + sae.b_enc
    if not hasattr(sae.cfg, "k"):
        return pre.clamp(min=0)
    keep = pre.argsort(-1, descending=True).argsort(-1) < sae.cfg.k
    return torch.where(keep, pre, 0.0).clamp(min=0)


def explicit_decode(sae, codes, layers, width):
    W_dec = sae.W_dec.view(-1, layers, width)
    return torch.einsum("tm,mld->tld", codes, W_dec) + sae.b_dec.view(layers, width)


def training_output(sae, x, l1=0.01):
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"l1": l1} if "l1" in sae.get_coefficients() else {},
            dead_neuron_mask=torch.ones(sae.cfg.d_sae, dtype=torch.bool),
            n_training_steps=1,
            is_logging_step=False,
        )
    )
