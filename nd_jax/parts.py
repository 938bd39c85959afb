"""The networks of a checkpoint folder one at a time: opened when wanted, in the dtype asked for, and let go of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nd_jax.converters.component import open_component
from nd_jax.converters.dtypes import parameter_dtype
from nd_jax.converters.folders import OFFICIAL, Folder
from nd_jax.data.tokenizers import TextTokenizer
from nd_jax.errors import UserError
from nd_jax.models.functional import Params


class Parts(Protocol):
    """Where a pipeline's networks come from. Names are those of an official folder's subfolders."""

    def has(self, name: str) -> bool: ...

    def config(self, name: str) -> Any:
        """The network's config; no weights are read."""
        ...

    def load(self, name: str, parts: Sequence[str] | None = None) -> Params:
        """Its parameters, or only those under the top-level keys ``parts``. The caller drops them when done."""
        ...

    def tokenizer(self, name: str, length: int) -> Any:
        """A ``TextTokenizer`` that makes ``length`` ids of every text."""
        ...


@dataclass(frozen=True)
class FolderParts:
    """``Parts`` of a folder. ``dtypes``: network -> dtype of its parameters in memory, with "" for all others; ``None``
    keeps what is stored. ``elsewhere``: networks that lie in folders of their own."""

    folder: Folder
    dtypes: Mapping[str, str | None] = field(default_factory=dict)
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    def _path(self, name: str) -> Path:
        if name in self.elsewhere:
            return self.elsewhere[name]
        if name not in self.folder.components:
            raise UserError(f"{self.folder.path} has no {name}; it has {', '.join(self.folder.components)}")
        return self.folder.components[name]

    def _kind(self, name: str) -> str:
        return OFFICIAL[name] if name in self.elsewhere else self.folder.kinds[name]

    def has(self, name: str) -> bool:
        return name in self.elsewhere or name in self.folder.components

    def config(self, name: str) -> Any:
        with open_component(self._path(name), self._kind(name)) as component:
            return component.config

    def load(self, name: str, parts: Sequence[str] | None = None) -> Params:
        dtype = self.dtypes.get(name, self.dtypes.get(""))
        with open_component(self._path(name), self._kind(name)) as component:
            return component.load(dtype=dtype, parts=parts)

    def tokenizer(self, name: str, length: int) -> TextTokenizer:
        if name not in self.folder.tokenizers:
            raise UserError(f"{self.folder.path} cannot read prompts: it lacks {name}; add this folder")
        return TextTokenizer.from_folder(self.folder.tokenizers[name], max_length=length)


def parse_dtypes(dtype: str | None, each: Sequence[str]) -> dict[str, str | None]:
    """``dtypes`` of ``FolderParts`` from one for all and some of the form NAME=DTYPE.

    Raises UserError for another form, an unknown network or dtype.
    """
    found: dict[str, str | None] = {"": dtype}
    for text in each:
        name, _, wanted = text.partition("=")
        if name not in OFFICIAL or not wanted:
            raise UserError(f"dtype {text!r}: expected NETWORK=DTYPE with a network of {', '.join(OFFICIAL)}")
        found[name] = wanted
    for wanted in found.values():
        parameter_dtype(wanted)
    return found
