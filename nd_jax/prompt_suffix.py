"""What may be appended to prompts."""

from __future__ import annotations

from collections.abc import Sequence

SUFFIXES = {
    "quality": ", hyper quality, Ultra HD, 8K",
    "cinematic": ", cinematic, realistic textures, high detail, natural colours",
}
"""What the public release appends to prompts."""


def with_suffix(prompts: Sequence[str], suffix: str) -> list[str]:
    """Prompts with one of ``SUFFIXES`` by name, or any other text, appended; empty prompts stay empty."""
    text = SUFFIXES.get(suffix, suffix)
    return [prompt + text if prompt else prompt for prompt in prompts]
