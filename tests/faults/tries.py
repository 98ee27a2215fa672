"""A pytest plugin that counts tries: the table of faults, promises, times tried and times held.

A test of a promise is marked `@pytest.mark.fault("R5")` and counts as one try; one that tries often counts
with the fixture `tries`. `--fault-table=FILE` writes the table, of the tests that were run.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.promises import PROMISES

PROPERTY = "tries"


class Tries:
    """Tries of one test."""

    def __init__(self) -> None:
        self.num_tried = self.num_held = 0

    def count(self, has_held: bool) -> None:
        """One more try, which held or not."""
        self.num_tried += 1
        self.num_held += has_held


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> Iterator[Tries]:
    """`tries.count(has_held)` for each try of a test that tries often; one that does not hold fails it."""
    counted = Tries()
    yield counted
    for fault in faults_of(request.node):
        record = (PROPERTY, [fault, counted.num_tried, counted.num_held])
        request.node.user_properties.append(record)
    assert counted.num_tried and counted.num_held == counted.num_tried, (
        f"held {counted.num_held} of {counted.num_tried}"
    )


def faults_of(item: Any) -> list[str]:
    """The promises that a test is about."""
    return [name for marker in item.iter_markers("fault") for name in marker.args]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Notes a test as one try of its promises, unless it counts itself."""
    report = yield
    if report.when == "call" and not report.skipped and "tries" not in item.fixturenames:
        item.user_properties += [
            (PROPERTY, [fault, 1, int(report.passed)]) for fault in faults_of(item)
        ]
    return report


class FaultTable:
    """Adds up what the tests of all workers tell when they are through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tried, self.held = Counter[str](), Counter[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Adds the tries of a test."""
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    fault, num_tried, num_held = value
                    self.tried[fault] += num_tried
                    self.held[fault] += num_held

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes the table; a promise that was tried, but too seldom, fails the session."""
        self.path.write_text(self.text(), encoding="utf-8")
        seldom = [
            f"{name} was tried {tried} times of {PROMISES[name].num_tries}"
            for name, tried in self.tried.items()
            if tried < PROMISES[name].num_tries
        ]
        if seldom and "slow" not in (session.config.getoption("-m") or ""):
            print("\n" + "\n".join(seldom))
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def text(self) -> str:
        """The table in Markdown."""
        lines = [
            "| | fault | promise | tried | held |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {name} | {one.fault} | {one.promise} | {self.tried[name]} | {self.held[name]} |"
                for name, one in PROMISES.items()
            ),
        ]
        return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """--fault-table=FILE and --soak-minutes=NUMBER."""
    parser.addoption("--fault-table", metavar="FILE", help="write the table of faults and promises")
    parser.addoption(
        "--soak-minutes", type=float, default=60.0, help="how long the soak test trains; 60"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Names the marker; adds the table in the process that collects all results."""
    config.addinivalue_line(
        "markers", "fault(name): a test of that promise of tests/faults/promises.py"
    )
    path = config.getoption("--fault-table")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultTable(Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses a promise that is not in the list."""
    for item in items:
        if unknown := set(faults_of(item)) - PROMISES.keys():
            raise pytest.UsageError(
                f"{item.nodeid}: no promise is named {', '.join(sorted(unknown))}"
            )
