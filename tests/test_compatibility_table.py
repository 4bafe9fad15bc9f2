# SPDX-License-Identifier: Apache-2.0
"""The compatibility table of tests/README.md: each row names tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest


_FOLDER = Path(__file__).parent
_ROWS = re.findall(
    r"^\| (?!-)(.+?) \|.*\| (.*) \|$", (_FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)
_PROVEN = {row: tests for row, tests in _ROWS if "::" in tests}


@pytest.mark.parametrize("row", _PROVEN)
def test_every_test_that_a_row_names_exists(row):
    for named in re.findall("`(.+?)`", _PROVEN[row]):
        file, _, name = named.partition("::")
        module = ast.parse((_FOLDER / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}, named


def test_every_row_names_a_test():
    table = (_FOLDER / "README.md").read_text(encoding="utf-8").split("## What works")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert [row for row in rows[1:] if "::test_" not in row] == []
