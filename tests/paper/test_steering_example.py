"""The rule that chooses a steering, on the demo model and a feature that is made to write words."""

import pytest
import torch

from sae_lens_route import activation_batches, find_contexts, load_model
from sae_lens_route.features.table import ContextOptions
from sae_lens_route.paper.steering_example import steering_example
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.saes.router import normalize

BLOCK, WORDS = 9, ("def", "return")
TEXT = "".join(f"def get_{n}(self):\n    return self.{n}\n\n" for n in ("name", "size", "path"))
PROMPT = (
    "class Reader:\n    def __init__(self, name, size, path, **options):\n"
    "        self.name = name\n        self"
)


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def read(model):
    """An SAE of one block. Feature 0 fires on two words and writes one; 1 fires on all others."""
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=128, d_sae=2, k=2, n_routed_layers=1))
    metadata = sae.cfg.metadata
    metadata.hook_name = f"blocks.{BLOCK}.route.hook_resid_post"
    metadata.hook_names, metadata.routed_blocks = [f"blocks.{BLOCK}.hook_resid_post"], [BLOCK]
    metadata.exclude_special_tokens = True
    ids = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([ids] * 8)
    (batch,) = activation_batches(model, sae, tokens)
    x = normalize(batch.activations[0, :, 0])
    words = {model.tokenizer.decode([i]).strip(): i for i in ids}
    is_word = torch.isin(tokens[0], torch.tensor([words[word] for word in WORDS]))
    direction = x[is_word].mean(0) - x[~is_word].mean(0)
    scores = x @ direction / direction.norm()
    assert scores[is_word].min() > scores[~is_word].max()
    between = (scores[is_word].min() + scores[~is_word].max()) / 2
    with torch.no_grad():
        sae.W_enc[:] = torch.stack([direction, -direction], dim=1) / direction.norm()
        sae.b_enc[:] = torch.stack([-between, between])
        sae.W_dec[:] = model.W_U[:, words[WORDS[1]]] * torch.tensor([[1.0], [-1.0]])
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    options = ContextOptions(0.01, (0.01,))
    batches = activation_batches(model, sae, tokens)
    return sae, find_contexts(sae, batches, model.tokenizer, options)


def test_the_feature_that_writes_its_word_is_chosen(model, read, monkeypatch):
    sae, table = read
    assert table.profile(0).n_classes == 2 and table.profile(1).n_classes > 8
    # a planted direction writes its word over and over, a trained feature should not
    monkeypatch.setattr("sae_lens_route.paper.steering_example._MAX_DENSITY", 0.5)
    monkeypatch.setattr("sae_lens_route.paper.steering_example._LEAST_DISTINCT", 0.4)
    example = steering_example(model, sae, table, PROMPT)
    assert example is not None and example.feature == 0 and example.words == [*WORDS]
    assert example.prompt == PROMPT[:80].rsplit(maxsplit=1)[0]
    assert example.n_steered > example.n_clean
    assert example.steered_text.count(WORDS[1]) > example.clean_text.count(WORDS[1])
    assert example.edit.startswith("0:set:") and 0 < example.largest_size < 1


def test_without_a_candidate_there_is_none(model, read):
    sae, table = read  # the words are more than one token in twenty of this text
    assert table.profile(0).density > 0.05
    assert steering_example(model, sae, table, PROMPT) is None
