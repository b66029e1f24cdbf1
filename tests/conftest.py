"""For all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Machines differ, and are shared: what comes out counts, not how long one example took.
settings.register_profile("hostd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hostd")
