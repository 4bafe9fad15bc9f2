# SPDX-License-Identifier: Apache-2.0
"""Help, tables for a terminal, and numbers as JSON, as the commands print and write them."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a table for a terminal, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, *rows]
    )


def write_report(report: dict[str, Any], path: str | os.PathLike) -> None:
    """
    Write numbers as JSON, which has neither NaN nor infinity: what is not finite, as a single seed's standard error, is `null`.
    """
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
