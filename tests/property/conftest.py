"""Hypothesis for machines of any speed: a slow one is no failure."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "penstock",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,  # so that a failure elsewhere can be replayed here
)
settings.load_profile("penstock")
