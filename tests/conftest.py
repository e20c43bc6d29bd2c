"""What every test shares: the real services and servers, and the rule that CI skips nothing."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # cores are shared
settings.load_profile("shared")
pytest_plugins = ["tests.services", "tests.live", "tests.wheel.venv"]
# Tests that share a costly thing run on one xdist worker, so that it is made once.
GROUPS = {"embedded": "embedded", "production": "production", "bare_venv": "embedded"}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = _group(item)
        if group:
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str | None:
    backend = getattr(item, "callspec", None) and item.callspec.params.get("live")
    needs = [backend] if backend else getattr(item, "fixturenames", [])
    groups = {GROUPS[name] for name in needs if name in GROUPS}
    if "browser" in Path(str(item.path)).parts or item.get_closest_marker("browser"):
        groups.add("browser")
    return min(groups, default=None)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test is a test that CI did not run: say so by failing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or hasattr(session.config, "workerinput") or reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped:
        names = ", ".join(sorted({report.nodeid for report in skipped}))
        reporter.write_line(f"CI skips nothing, but these were skipped: {names}", red=True)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
