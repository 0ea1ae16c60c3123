"""What every test shares: hypothesis without deadlines, because a first call may compile or import."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "moslora", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("moslora")
