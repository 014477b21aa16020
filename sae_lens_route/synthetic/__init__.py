"""Residual streams with known features: routers and dictionaries are scored exactly."""
