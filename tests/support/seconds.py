"""Processor seconds by folder of tests, printed when they end: other programs on the machine change them little."""

import collections
import os
import pathlib

import pytest

_spent = [0.0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write into each report the processor seconds of its phase, those of ended child processes included."""
    report = yield
    before, _spent[0] = _spent[0], sum(os.times()[:4])
    report.user_properties = [*report.user_properties, ("processor_seconds", _spent[0] - before)]
    return report


def pytest_runtest_logstart():
    """Count from the first test on, so that imports and collection are not a test's."""
    _spent[0] = _spent[0] or sum(os.times()[:4])


def pytest_terminal_summary(terminalreporter):
    """Print the seconds of each folder, the most costly one first."""
    folders = collections.Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if isinstance(report, pytest.TestReport):
            folder = str(pathlib.PurePosixPath(report.nodeid.partition("::")[0]).parent)
            folders[folder] += dict(report.user_properties).get("processor_seconds", 0.0)
    terminalreporter.section("processor seconds by folder")
    for folder, seconds in [*folders.most_common(), ("in all", folders.total())]:
        terminalreporter.write_line(f"{seconds:7.1f}  {folder}")
