"""`RouteSAETransformer`: a HookedSAETransformer whose calls are watched from the beginning."""

from __future__ import annotations

from typing import Any

from sae_lens import HookedSAETransformer

from sae_lens_route.splice.model_calls import ModelCalls


class RouteSAETransformer(HookedSAETransformer):
    """A HookedSAETransformer for several threads.

    Every HookedSAETransformer takes RouteSAEs and crosscoders (`saelens_models.py`). On this one,
    threads take turns even before the first of them is attached.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ModelCalls.watch(self)
