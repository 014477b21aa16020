"""Telling kinds of SAEs apart."""

from support.crosscoders import CLASSES, crosscoder
from support.splice import route_sae

from sae_lens_route.saes.kinds import SPARSITY_FIELDS, is_crosscoder, is_soft


def test_crosscoders_and_soft_routing():
    assert all(is_crosscoder(crosscoder(kind)) for kind in CLASSES)
    assert not is_crosscoder(route_sae([1, 2])) and not is_soft(route_sae([1, 2]))
    assert is_soft(route_sae([1, 2], routing="soft")) and not is_soft(crosscoder())


def test_every_training_architecture_has_a_sparsity_field():
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items():
        if name.startswith(("route_", "crosscoder", "multi_layer")):
            assert any(hasattr(config, field) for field in SPARSITY_FIELDS), name
