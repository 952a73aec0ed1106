"""DEPENDENCIES.md is what the lock and the installed packages say."""

from __future__ import annotations

import licences


def test_the_page_is_current() -> None:
    text = licences.PAGE.read_text()
    assert licences.page(licences.kept_rows(text)) == text, "run `python tools/licences.py --write`"


def test_every_package_has_a_licence() -> None:
    rows = licences.kept_rows(licences.PAGE.read_text())
    assert len(rows) > 100
    assert [key for key, licence in rows.items() if licence == licences.UNKNOWN] == []


def test_metadata_without_an_expression_still_say_something() -> None:
    assert licences.installed_licence("torch", "0.0") is None
    assert licences.installed_licence("no-such-package") is None
    assert licences.installed_licence("pytest") == "MIT"
