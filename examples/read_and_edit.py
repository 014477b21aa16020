"""Read and edit routed features with SAELens's and TransformerLens's own tools.

python examples/read_and_edit.py route-sae
"""

import sys

import torch
from sae_lens import SAE

import sae_lens_route  # noqa: F401  (makes RouteSAEs known to SAELens; before SAE.load_from_disk)
from sae_lens_route.models.load import load_model
from sae_lens_route.splice import attach

sae = SAE.load_from_disk(sys.argv[1] if len(sys.argv) > 1 else "route-sae")
model = load_model(sae.cfg.metadata.model_name)
tokens = model.to_tokens("def read(self, size=-1):\n    return self.buffer")
hook_name = sae.cfg.metadata.hook_name

with attach(model, sae) as hook:
    # Read: the routed activation is a hook point like any other.
    logits, cache = model.run_with_cache(tokens)
    feature_acts = sae.encode(cache[hook_name])
    blocks = [hook.routed_blocks[i] for i in hook.routing.route[0].tolist()]
    words = model.to_str_tokens(tokens)
    for token, block, acts in zip(words, blocks, feature_acts[0], strict=True):
        print(f"{token!r:12} block {block:2}  strongest feature {int(acts.argmax())}")

    # Edit: SAELens splices the SAE in; each token is rewritten at the block it was routed to.
    with model.saes(saes=[sae]):
        spliced = model(tokens)

kl = (logits.softmax(-1) * (logits.log_softmax(-1) - spliced.log_softmax(-1))).sum(-1)
print(f"KL from splicing the SAE in: {kl[0, 1:].mean():.3f} nats per token")
torch.testing.assert_close(model(tokens), logits)  # detached: the model is as it was
