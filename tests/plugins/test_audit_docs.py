"""Each kind of finding has a page: what it means, how to confirm it, what benign software causes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from volatility3_ept.core.audit_finding import Kind

DOCS = Path(__file__).parents[2] / "docs" / "audit"
SECTIONS = ["What it means", "How to confirm it", "What benign software causes it"]


def test_a_page_for_each_kind_and_no_other():
    assert {page.name for page in DOCS.iterdir()} == {kind.page for kind in Kind} | {"README.md"}


@pytest.mark.parametrize("kind", Kind, ids=str)
def test_a_page_answers_the_three_questions(kind):
    text = (DOCS / kind.page).read_text()
    assert text.startswith(f"# {kind}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    parts = re.split(r"^## .*$", text, flags=re.MULTILINE)
    assert all(len(part.strip()) > 20 for part in parts[1:])
    assert re.search(r"info|low|medium|high", parts[0], re.IGNORECASE), "the severity"
    assert re.search(r"^vol .* ept\.", parts[2], re.MULTILINE), "a command"


def test_the_overview_names_all_in_the_words_of_the_plugin():
    links = re.findall(r"^\| \[(.*?)\]\((.*?)\)", (DOCS / "README.md").read_text(), re.MULTILINE)
    assert links == [(str(kind), kind.page) for kind in Kind]
