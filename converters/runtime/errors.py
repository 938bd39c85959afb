"""One exception for everything a user can put right."""

from __future__ import annotations


class BundleError(Exception):
    """Bad input: one line that says what, where, and what was expected."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
