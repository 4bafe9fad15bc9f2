# SPDX-License-Identifier: Apache-2.0
"""Private names of other libraries are in one list, with what to do if one goes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hf_aace
from hf_aace import _compat


ROOT = Path(hf_aace.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
PRIVATE = re.compile("_[a-zA-Z]")  # __dunder__ names are public
PUBLIC_ALL_THE_SAME = {"_asdict", "_exit"}  # of named tuples and of os
LISTED = {
    name
    for line in re.findall(r"^- (.+?) \(", _compat.__doc__, re.MULTILINE)
    for name in re.findall(r"`(?:\w+\.)*(\w+)`", line)
}


def definitions(tree: ast.Module) -> Iterator[str]:
    """The names that a file defines: functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def private_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """The private names that a file uses and that are not the package's own; what `super()` has is another's in any case."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr not in own or ast.unparse(node.value) == "super()"):
            yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            modules = [getattr(node, "module", ""), *(alias.name for alias in node.names)]
            yield from ".".join(modules).split(".")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def test_private_names_of_other_libraries_are_in_the_list():
    trees = {path: ast.parse(text) for path, text in SOURCES.items()}
    own = {name for tree in trees.values() for name in definitions(tree)}
    for path, tree in trees.items():
        found = {str(name) for name in private_names(tree, own) if PRIVATE.match(str(name))}
        unlisted = found - LISTED - PUBLIC_ALL_THE_SAME
        assert not unlisted, f"{path.relative_to(ROOT)}: find a public name, or add these to the list in _compat.py"


def test_the_list_holds_only_what_is_used():
    code = "\n".join(SOURCES.values()).replace(_compat.__doc__, "")
    assert len(LISTED) > 10
    assert {name for name in LISTED if not re.search(rf"\b{name}\b", code)} == set()
