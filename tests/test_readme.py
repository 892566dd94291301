"""What the README states and the code knows."""

from __future__ import annotations

import re

from kernelpose.info import backend_table
from kernelpose.models.command import model_table
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_backend_table_is_the_registry() -> None:
    assert f"-->\n{backend_table()}\n<!--" in README


def test_model_table_is_the_zoo() -> None:
    assert f"-->\n{model_table()}\n<!--" in README


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
