"""Settings of all tests."""

import pytest
from hypothesis import settings

# A slow day is no failure: a deadline of 200 ms an example, Hypothesis's own, was missed by a busy machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


class AtOnce:
    """Shows a failure when it happens: what ends the whole run from outside would keep it from its report."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\n{report.nodeid} ({report.when}) after {report.duration:.0f} s\n{report.longreprtext[-6000:]}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(AtOnce(config))
