"""Checkpoints of the reference implementation load as SAEs, without pickle execution."""

import pytest
import torch
from sae_lens import SAE
from support.golden import golden_sae, load

from sae_lens_route.errors import UserError
from sae_lens_route.saes.reference_checkpoint import reference_converter


def test_a_reference_checkpoint_loads_through_the_converter(tmp_path):
    tensors, info = load("seed0_route")
    names = [name for name in tensors if name.startswith("param.")]
    torch.save({n.removeprefix("param."): tensors[n] for n in names}, tmp_path / "model.pt")
    loaded = SAE.load_from_disk(tmp_path / "model.pt", converter=reference_converter(k=info["k"]))
    assert type(loaded).__name__ == "RouteTopKSAE"
    x = tensors["x_raw"][0]
    expected = golden_sae(tensors, info)
    assert torch.equal(loaded.route(x).probs, expected.route(x).probs)
    torch.testing.assert_close(
        loaded.decode(loaded.encode_layers(x)), tensors["hard_sum.x_hat"], rtol=1e-5, atol=1e-5
    )


def test_another_file_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a RouteSAE checkpoint"):
        SAE.load_from_disk(tmp_path / "other.pt", converter=reference_converter(k=4))
