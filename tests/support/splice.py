"""Small random models of every kind, and the splice by brute force: two passes with plain hooks."""

from types import SimpleNamespace

import torch
import transformer_lens
from sae_lens import HookedSAETransformer
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from support.golden import FOLDER

D, VOCAB = 32, 512

KINDS = ["hooked-llama", "hooked-gpt2", "proxy-llama", "proxy-gpt2"]
if has_transformer_bridge():
    KINDS += ["bridge-llama", "bridge-gpt2"]


def hooked_model(style, cls=HookedSAETransformer, n_layers=8, seed=0, d=D):
    shape = {"n_layers": n_layers, "d_model": d, "n_ctx": 96, "d_vocab": VOCAB}
    attention = {"n_heads": 4, "d_head": d // 4, "d_mlp": 2 * d}
    llama = {
        "n_key_value_heads": 2,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": d // 4,
    }
    style_fields = llama if style == "llama" else {"act_fn": "gelu_new", "normalization_type": "LN"}
    cfg = HookedTransformerConfig(
        **shape, **attention, **style_fields, dtype=torch.float64, seed=seed, device="cpu"
    )
    return cls(cfg).eval()


def hf_model(style, n_layers=8, seed=0):
    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    if style == "llama":
        cfg = LlamaConfig(
            hidden_size=D,
            intermediate_size=2 * D,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            **common,
        )
        return LlamaForCausalLM(cfg).double().eval()
    cfg = GPT2Config(n_embd=D, n_layer=n_layers, n_head=4, n_positions=128, **common)
    return GPT2LMHeadModel(cfg).double().eval()


def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "tinyllama")


class OnlyBlocks(torch.nn.Module):
    """A stand-in for a Hugging Face model that is nothing but its blocks."""

    def __init__(self, blocks, width):
        super().__init__()
        config = SimpleNamespace(num_hidden_layers=len(blocks), hidden_size=width)
        self.config = SimpleNamespace(get_text_config=lambda: config)
        self.layers = torch.nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            x = tensor(layer(x))
        return x


def route_sae(blocks, seed=0, d=D, cls=RouteTopKSAE, cfg=RouteTopKSAEConfig, **options):
    """An untrained RouteSAE, its weights large enough to use all blocks and change the model."""
    torch.manual_seed(seed)
    sae = cls(
        cfg(
            d_in=d,
            d_sae=4 * d,
            n_routed_layers=len(blocks),
            dtype="float64",
            metadata=SAEMetadata(
                hook_name=f"blocks.{blocks[-1]}.route.hook_resid_post",
                hook_names=[f"blocks.{b}.hook_resid_post" for b in blocks],
            ),
            **{"k": 8, **options},
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.W_enc /= d**0.5
        sae.W_dec /= 3
        sae.W_router /= 10
    return sae.requires_grad_(False)


def some_tokens(batch=2, length=7, seed=0):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, mask=None):
    """Logits; a proxy drops the mask, so the Hugging Face model inside is asked."""
    if isinstance(model, HookedProxyLM):
        return model.model(tokens, attention_mask=mask).logits
    return model(tokens, attention_mask=mask, return_type="logits")


def tensor(output):
    return output[0] if isinstance(output, tuple) else output


def with_hooks(blocks, make_hook, run_model):
    handles = [block.register_forward_hook(make_hook(i)) for i, block in enumerate(blocks)]
    try:
        return run_model()
    finally:
        for handle in handles:
            handle.remove()


def clean_streams(blocks, routed, run_model):
    streams = {}

    def make_hook(i):
        return lambda module, args, output: streams.__setitem__(i, tensor(output))

    logits = with_hooks(blocks, make_hook, run_model)
    return logits, [streams[i] for i in routed]


def brute_routing(sae, streams):
    normed = [(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) for x in streams]
    p, i = torch.softmax(sum(normed) @ sae.W_router, -1).max(-1)
    return p, i


def brute_force(model, sae, routed, f, run_model, unscaled=False, seen=None):
    """Logits with f spliced in, the routing, and the activation of each token at its block.

    The activations are those of the pass with f in it. `seen` is called with each routed block's
    tokens, and with the stream before and after f.
    """
    blocks = decoder_blocks(model)
    _, streams = clean_streams(blocks, routed, run_model)
    p, chosen = brute_routing(sae, streams)
    p = torch.ones_like(p) if unscaled else p
    p = p.unsqueeze(-1)
    used = torch.zeros_like(streams[0])

    def make_hook(index):
        def hook(module, args, output):
            if index not in routed:
                return None
            x = tensor(output)
            mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6
            value = p * (x - mean) / scale
            here = (chosen == routed.index(index)).unsqueeze(-1)
            used.copy_(torch.where(here, value, used))
            before, x = x, torch.where(here, f(value) / p * scale + mean, x)
            if seen is not None:
                seen(here, before, x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    return with_hooks(blocks, make_hook, run_model), chosen, used


def hooks_on(model):
    """Every module with its number of hooks and attributes, to see that none is left behind."""
    root = model.model if isinstance(model, HookedProxyLM) else model
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), set(vars(module)))
        for name, module in root.named_modules()
    }


def block_calls(model, run_model):
    """How often each block ran."""
    counts = [0] * len(decoder_blocks(model))

    def make_hook(i):
        def hook(module, args, output):
            counts[i] += 1

        return hook

    with_hooks(decoder_blocks(model), make_hook, run_model)
    return counts


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def hook_of(f):
    return lambda value, hook: f(value)


KeyValueCache = getattr(transformer_lens, "HookedTransformerKeyValueCache", None) or (
    transformer_lens.TransformerLensKeyValueCache
)


class CachedSteps:
    """`step(tokens, mask)` -> logits of the new tokens, with one cache for all steps."""

    def __init__(self, model, batch):
        self.model = model
        self.hooked = isinstance(model, HookedTransformer)
        self.cache = (
            KeyValueCache.init_cache(model.cfg, "cpu", batch) if self.hooked else DynamicCache()
        )

    def step(self, tokens, mask, n_seen):
        if self.hooked:
            new = mask[:, n_seen : n_seen + tokens.shape[1]]
            return self.model(tokens, past_kv_cache=self.cache, attention_mask=new)
        total = mask[:, : n_seen + tokens.shape[1]]
        kwargs = {"past_key_values": self.cache, "attention_mask": total, "use_cache": True}
        if isinstance(self.model, HookedProxyLM):
            return self.model.model(tokens, **kwargs).logits
        return self.model(tokens, return_type="logits", **kwargs)


def greedy(model, tokens, cached, n=64):
    if isinstance(model, HookedProxyLM):
        return model.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=n,
            min_new_tokens=n,
            use_cache=cached,
            pad_token_id=1,
        )
    return model.generate(
        tokens,
        max_new_tokens=n,
        do_sample=False,
        stop_at_eos=False,
        use_past_kv_cache=cached,
        prepend_bos=False,
        return_type="tokens",
        verbose=False,
    )


def add_everywhere(x):
    return x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
