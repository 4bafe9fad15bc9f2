# SPDX-License-Identifier: Apache-2.0
"""The package can be read from the top down, in the order that its docstring has: a file imports only what stands above it."""

import ast
import re
from pathlib import Path

import hf_aace


ORDER = re.findall(r"^    (\w+)(?:\.py|/) ", hf_aace.__doc__, re.MULTILINE)
ROOT = Path(hf_aace.__file__).parent


def imports(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in it."""
    parts = ["hf_aace", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = [*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]
            found |= {module[1]} if len(module) > 1 and module[1] else {alias.name for alias in node.names}
    return found


def test_imports_point_upwards():
    files = [path for path in ROOT.rglob("*.py") if path.name != "__main__.py" and path != ROOT / "__init__.py"]
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files} == set(ORDER)
    for path in files:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        above = ORDER[: ORDER.index(own) + (path.parent != ROOT)]
        assert imports(path) <= set(above), f"{path.relative_to(ROOT)} imports what stands below it"
