"""What every test shares: the real services and servers, and the rule that CI skips nothing."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from django.db.backends.base.operations import BaseDatabaseOperations
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from fleet.audit import protection

settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # cores are shared
settings.load_profile("shared")
pytest_plugins = ["tests.services", "tests.live", "tests.wheel.venv"]
# Tests that share a costly thing run on one xdist worker, so that it is made once. By what stands in a test's id: xdist
# 3.8 writes the groups of `--dist loadgroup` where pytest 9.2 no longer reads them.
GROUPS = {
    "production": (
        "[production", "tests/e2e/test_fast_poll", "test_serve.py::test_a_presigned",
        "test_serve.py::test_metrics_gather",
    ),
    "attacks": ("tests/attacks/test_rows",),
    "embedded": (
        "[embedded", "tests/deploy/test_mirror", "tests/e2e/test_faults", "tests/e2e/test_acceptance",
        "tests/e2e/test_foreign", "tests/e2e/test_sdk_readme", "tests/e2e/test_revocation", "tests/e2e/test_guards",
        "tests/e2e/test_notices", "tests/e2e/test_waiting", "tests/e2e/test_probation", "tests/wheel/",
        "tests/server/test_secrets",
    ),
    "browser": ("tests/browser/",),
    "drills": ("tests/drills/",),
    "bench": ("tests/test_bench.py",),
    "chaos": ("tests/server/test_chaos",),
    "week": ("tests/sdk/test_week",),
    "deploy": ("tests/operations/test_deploy_check",),
}  # fmt: skip
# With servers of their own, or commands without end. They wait more than they work: after the groups, before the small.
ALONE = ("tests/e2e/test_demo.py", "tests/deploy/test_keys.py", "tests/e2e/test_readme.py")


class Scheduling(LoadScopeScheduling):
    """Each group to one worker, every other test to whoever is free. What takes long comes first."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid) or nodeid


def group_of(nodeid: str) -> str | None:
    found = (group for group, parts in GROUPS.items() if any(part in nodeid for part in parts))
    return None if nodeid.startswith(ALONE) else next(found, None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: turn(item.nodeid))


def turn(nodeid: str) -> int:
    group = group_of(nodeid)
    if group is not None:
        return list(GROUPS).index(group)
    return len(GROUPS) + (not nodeid.startswith(ALONE))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    config.option.loadscopereorder = False  # xdist's own order puts single tests last, however long they take
    return Scheduling(config, log)


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


@pytest.fixture(autouse=True, scope="session")
def the_audit_trail_can_be_flushed() -> Iterator[None]:
    """Tests with transactions of their own flush every table; the trail's triggers refuse that, as they should.

    The flush's own `post_migrate` installs them again.
    """
    flush = BaseDatabaseOperations.execute_sql_flush

    def lifted(operations: Any, sql_list: Any) -> None:
        protection.lift(operations.connection)
        flush(operations, sql_list)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseDatabaseOperations, "execute_sql_flush", lifted)
        yield
