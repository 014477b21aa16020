"""Steering: edits of features while the model reads and writes."""

from sae_lens_route.steering.edits import FeatureEdit, default_clamp, edit_features
from sae_lens_route.steering.maxima import maxima_of_table, measured_maxima
from sae_lens_route.steering.render import render
from sae_lens_route.steering.steer import SteeringResult, steer

__all__ = [
    "FeatureEdit",
    "SteeringResult",
    "default_clamp",
    "edit_features",
    "maxima_of_table",
    "measured_maxima",
    "render",
    "steer",
]
