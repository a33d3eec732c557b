"""Bounds in the proportion to some thousand fakes that the real ones have to a hundred thousand."""

from __future__ import annotations

import pytest

from volatility3_ept.core import hearing, leaves, roots, triage


@pytest.fixture
def small_bounds(monkeypatch) -> None:
    monkeypatch.setattr(triage, "MAX_EXAMINED", 160)
    monkeypatch.setattr(roots, "MAX_JUDGED", 24)
    monkeypatch.setattr(hearing, "MAX_HEARD", 24)
    monkeypatch.setattr(hearing, "MAX_WASTED_TABLES", 1 << 11)
    monkeypatch.setattr(hearing, "MAX_COPIES", 64)


@pytest.fixture
def tables_read(monkeypatch) -> list[int]:
    """How many tables each step of each traversal reads: a clock would measure the computer."""
    counted: list[int] = []
    plain = leaves.read_tables

    def read(memory, fmt, level, tables):
        counted.append(len(tables))
        return plain(memory, fmt, level, tables)

    monkeypatch.setattr(leaves, "read_tables", read)
    return counted
