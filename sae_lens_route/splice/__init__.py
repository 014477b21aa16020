"""The routed hook point in a running language model: reading, editing, SAEs spliced in."""

from sae_lens_route.splice.attach import attach
from sae_lens_route.splice.crosscoder import CrosscoderHook
from sae_lens_route.splice.routed import RoutedHook
from sae_lens_route.splice.transformer import RouteSAETransformer

__all__ = ["CrosscoderHook", "RouteSAETransformer", "RoutedHook", "attach"]
