"""Comparing results."""

import pytest


def assert_close(a, b, tolerance=1e-12):
    """Assert that two evaluations agree to a tolerance and are null in the same fields."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = [a[key] for key in a], [b[key] for key in a]
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, tolerance)
    else:
        assert a == b or a == pytest.approx(b, rel=tolerance, abs=1e-12)
