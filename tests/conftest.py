"""Options of all tests: ``--exhaustive``, and ``--strict-skips`` with ``--missing``.

Tests marked ``exhaustive`` run only with ``--exhaustive``.

With ``--strict-skips`` a test that skips for what could have been there fails. A skip whose cause
no set-up cures (``UNCURABLE``) stays one. So does, for each program of ``--missing``, the skip for
want of exactly that program: whoever calls pytest has tried to install it. The summary counts both,
so that nobody takes what was left out for what has passed.
"""

import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

# Reasons, and what they are counted as.
UNCURABLE = {
    r"nothing to run": "a page without commands",
    r"this processor has no .*": "another processor",
    r"of vLLM's CPU engine": "a machine with a GPU",
    r"no inotify": "another operating system",
    r"mounting a tmpfs needs root.*|no mount command": "no right to mount",
}
# Programs (and one service) that .ci/run tries to install.
PROGRAMS = {
    "chromium": r"Chromium is not installed.*",
    "docker-compose": r"there is no `docker compose`",
    "kubectl": r"there is no kustomize and no kubectl",
    "npm": r"npm is not installed.*|needs node and npm",
    "npm-registry": r"the npm registry is not reached|npm cannot install .*",
    "openssl": r"needs openssl.*",
    "prometheus": r"Debian's package prometheus is not installed",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption("--exhaustive", action="store_true", help="run the tests marked exhaustive too")
    group = parser.getgroup("skips")
    group.addoption("--strict-skips", action="store_true", help="fail where a cure would run it")
    group.addoption(
        "--missing",
        default="",
        metavar="PROGRAM,...",
        help=f"what could not be installed, for --strict-skips: {', '.join(PROGRAMS)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    if unknown := missing(config) - PROGRAMS.keys():
        raise pytest.UsageError(f"--missing: no such program: {', '.join(sorted(unknown))}")


def pytest_report_header(config: pytest.Config) -> str:
    # pytest-xdist does not count what its workers deselect.
    asked = config.getoption("--exhaustive")
    return "all tests" if asked else "without the tests marked exhaustive: give --exhaustive"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (left_out if item.get_closest_marker("exhaustive") else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def missing(config: pytest.Config) -> set[str]:
    return set(filter(None, config.getoption("--missing").split(",")))


def cause(reason: str, absent: set[str]) -> str | None:
    """What a skip is allowed for; None if it is not."""
    allowed = UNCURABLE | {PROGRAMS[name]: f"no {name}" for name in sorted(absent)}
    return next((why for words, why in allowed.items() if re.fullmatch(words, reason, re.S)), None)


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Of a skipped one."""
    words = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return words.removeprefix("Skipped: ")


def judge(config: pytest.Config, report: Any) -> None:
    """Turn a skip that is not allowed into a failure."""
    if not config.getoption("--strict-skips") or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = reason_of(report)
    if cause(reason, missing(config)) is None:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skipped under --strict-skips: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    judge(item.config, report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    judge(collector.config, report)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--strict-skips"):
        return
    absent = missing(config)
    reports = terminalreporter.stats.get("skipped", ())
    counts = Counter(cause(reason_of(report), absent) for report in reports)
    found = [f"{count} for {why}" for why, count in sorted(counts.items(), key=str)]
    terminalreporter.section("strict skips")
    terminalreporter.line(f"skipped: {', '.join(found) or 'none'}")
    if absent:
        terminalreporter.line(f"NOT TESTED, could not be installed: {', '.join(sorted(absent))}")
