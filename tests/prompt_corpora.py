"""A prompt that stands for those of evaluation, and packages that prompts are composed of, made up."""

from __future__ import annotations

from pathlib import Path

SECRET = "A glass whale, swimming over Ümlaut City"
METADATA = """
raise RuntimeError("this file is read, never run")
OPENAI_IMAGENET_TEMPLATES = (lambda c: f'a photo of a {c}.', lambda c: f'many {c}, {{so}} many')
IMAGENET_CLASSNAMES = ('tench', "cock o'the rock", 'sea lion')
"""


def write_packages(folder: Path) -> Path:
    """Two packages with the files that are read, in a folder of their own."""
    data, zero_shot = folder / "clip_interrogator" / "data", folder / "open_clip"
    for each in (data, zero_shot):
        each.mkdir(parents=True)
    for package in (data.parent, zero_shot):
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("artists", "flavors", "mediums", "movements", "negative"):
        (data / f"{name}.txt").write_text("".join(f"{name[:-1]} {n}\n" for n in range(50)))
    (zero_shot / "zero_shot_metadata.py").write_text(METADATA)
    return folder
