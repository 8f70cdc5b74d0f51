"""`pytest benchmarks` measures by the protocol of jepa_fast.perf."""

from __future__ import annotations

# Here, as pytest takes plugins from the top conftest.py alone.
pytest_plugins = ["jepa_fast.perf.pytest_plugin"]
