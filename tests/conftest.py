"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# Machines that run tests are shared: how long one example takes says nothing.
settings.register_profile("distri", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("distri")
