"""What holds for all tests."""

import pytest
from hypothesis import HealthCheck, settings

# Machines that run tests are shared: how long one example takes says nothing.
settings.register_profile("distri", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("distri")


@pytest.fixture(autouse=True)
def _own_data_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs teach about a machine is nobody else's business: not the user's, not the next test's."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
