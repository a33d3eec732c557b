"""What a run of the tests says at its end."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter):
    """Print how often ``ept.audit`` raised a false alarm, where its clean captures were looked at."""
    looked = [
        counts
        for reports in (terminalreporter.getreports("passed"), terminalreporter.getreports("failed"))
        for report in reports
        for name, counts in report.user_properties
        if name == "clean"
    ]
    if looked:
        alarms, machines = (sum(column) for column in zip(*looked, strict=True))
        terminalreporter.write_line(
            f"ept.audit: {alarms} false alarms in {machines} machines of {len(looked)} clean captures"
        )
