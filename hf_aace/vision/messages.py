# SPDX-License-Identifier: Apache-2.0
"""Shorten errors and lists for messages."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, without a full stop; its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def first_few(items: list[str]) -> str:
    """Join the first five for a message."""
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
