"""Pages of features to open in a browser: those of this package, and those of SAEDashboard."""

from sae_lens_route.dashboards.page import write_dashboard

__all__ = ["write_dashboard"]
