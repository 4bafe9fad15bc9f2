# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """The rows below the header, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, *rows]
    )
