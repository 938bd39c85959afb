"""One table per checkpoint: rules that pair a parameter path with a torch name and say how the array is turned.

A rule is written once and drives both directions. ``{word}`` in both patterns stands for one path segment;
``{word=a|b}`` for one of those listed. ``{layer}`` only in the torch pattern means that the leaf is a stack: its
leading axis counts the layers, and every layer is a tensor of its own on the torch side.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from nd_jax.checked_files import shown
from nd_jax.errors import UserError

Path = tuple[str, ...]
_MOST_TENSORS = 1_000_000


@dataclass(frozen=True)
class Layout:
    """How one tensor is turned: axis k of the JAX array is axis ``axes[k]`` of the torch tensor; ``None``: as it is."""

    axes: tuple[int, ...] | None = None

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """JAX order to torch order, as a view."""
        return array if self.axes is None else array.transpose(np.argsort(self.axes))

    def torch_order(self, per_axis: Sequence) -> tuple:
        """Something per JAX axis (sizes, slices) put into torch order."""
        if self.axes is None:
            return tuple(per_axis)
        return tuple(per_axis[k] for k in np.argsort(self.axes))

    def fits(self, rank: int) -> bool:
        return self.axes is None or len(self.axes) == rank


SAME = Layout()
LINEAR = Layout((1, 0))  # [out, in] <-> [in, out]
CONV2D = Layout((2, 3, 1, 0))  # [out, in, h, w] <-> [h, w, in, out]
CONV3D = Layout((2, 3, 4, 1, 0))  # [out, in, t, h, w] <-> [t, h, w, in, out]


@dataclass(frozen=True)
class Rule:
    """``path`` (segments joined by ``/``) <-> ``torch`` (segments joined by ``.``)."""

    path: str
    torch: str
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.torch and "{layer}" not in self.path

    def match(self, path: str) -> str | None:
        """The torch name of ``path``, with ``{layer}`` still open if stacked; ``None`` if the rule is not about it."""
        pieces = re.split(r"\{(\w+)(?:=([^}]*))?\}", self.path)
        pattern = re.escape(pieces[0])
        for word, choice, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            pattern += f"(?P<{word}>{choice or '[^/]+'})" + re.escape(text)
        found = re.fullmatch(pattern, path)
        if found is None:
            return None
        return re.sub(r"\{(\w+)\}", lambda word: found.groupdict().get(word[1], word[0]), self.torch)


def linear(path: str, torch: str) -> list[Rule]:
    """Rules of a linear layer: kernel and bias."""
    return [Rule(f"{path}/kernel", f"{torch}.weight", LINEAR), Rule(f"{path}/bias", f"{torch}.bias")]


def conv2d(path: str, torch: str) -> list[Rule]:
    """Rules of a 2-D convolution: kernel and bias."""
    return [Rule(f"{path}/kernel", f"{torch}.weight", CONV2D), Rule(f"{path}/bias", f"{torch}.bias")]


def conv3d(path: str, torch: str) -> list[Rule]:
    """Rules of a 3-D convolution: kernel and bias."""
    return [Rule(f"{path}/kernel", f"{torch}.weight", CONV3D), Rule(f"{path}/bias", f"{torch}.bias")]


def norm(path: str, torch: str) -> list[Rule]:
    """Rules of a normalisation: scale and bias."""
    return [Rule(f"{path}/scale", f"{torch}.weight"), Rule(f"{path}/bias", f"{torch}.bias")]


def embedding(path: str, torch: str) -> list[Rule]:
    """Rule of an embedding table."""
    return [Rule(f"{path}/embedding", f"{torch}.weight")]


@dataclass(frozen=True)
class Entry:
    """One torch tensor and where it goes: ``layer`` is its place on the leading axis, ``None`` if not stacked."""

    name: str
    shape: tuple[int, ...]
    path: Path
    layer: int | None
    layout: Layout


@dataclass(frozen=True)
class Buffer:
    """A tensor that the checkpoint holds but that follows from the config: made on export, checked on import.

    ``blocks()`` yields its content in order, piece by piece; ``tolerance`` is absolute, for float32.
    """

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]
    what: str
    tolerance: float = 1e-6


@dataclass(frozen=True)
class Extras:
    """What a checkpoint may hold beside its parameters.

    ``twins``: second name -> first name of a tensor saved twice. ``ignored``: regular expressions of names that older
    or larger files carry and nobody needs.
    """

    buffers: Mapping[str, Buffer] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()


def flatten(tree: Mapping, prefix: Path = ()) -> Iterator[tuple[Path, object]]:
    """Leaves of a nested dict with their paths, in the order of the dict."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def unflatten(leaves: Iterable[tuple[Path, object]]) -> dict:
    """The nested dict of ``(path, leaf)`` pairs."""
    tree: dict = {}
    for path, leaf in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


class Table:
    """The rules applied to one network: every torch name with its shape, and every leaf with the tensors it is made of.

    Args:
        rules: in order; the first that matches a path holds.
        abstract: nested dict of ``jax.ShapeDtypeStruct``, as ``Definition.abstract()`` gives it.
        extras: tensors beside the parameters.

    Raises:
        UserError: if a path has no rule, two leaves have the same torch name, or a rule does not fit a leaf's rank.
    """

    def __init__(self, rules: Iterable[Rule], abstract: Mapping, extras: Extras | None = None):
        rules = list(rules)
        self.extras = extras or Extras()
        self.leaves: dict[Path, list[Entry]] = {}
        self.abstract: dict[Path, jax.ShapeDtypeStruct] = dict(flatten(abstract))
        self.entries: dict[str, Entry] = {}
        for path, leaf in self.abstract.items():
            self.leaves[path] = list(self._entries(rules, path, leaf))
            for entry in self.leaves[path]:
                if entry.name in self.entries:
                    other = "/".join(self.entries[entry.name].path)
                    raise UserError(f"parameters {other} and {'/'.join(path)} both map to {shown(entry.name)}")
                self.entries[entry.name] = entry

    def _entries(self, rules: list[Rule], path: Path, leaf: jax.ShapeDtypeStruct) -> Iterator[Entry]:
        text = "/".join(path)
        rule, name = next(((rule, name) for rule in rules if (name := rule.match(text)) is not None), (None, ""))
        if rule is None:
            raise UserError(f"parameter {text} has no rule in the table of names; add one to converters/names_*.py")
        shape = leaf.shape[1:] if rule.stacked else leaf.shape
        if not rule.layout.fits(len(shape)):
            raise UserError(f"parameter {text} has shape {list(leaf.shape)}, which its rule {rule} does not fit")
        shape = rule.layout.torch_order(shape)
        if not rule.stacked:
            yield Entry(name, shape, path, None, rule.layout)
            return
        if len(self.entries) + leaf.shape[0] > _MOST_TENSORS:
            raise UserError(f"the config asks for {leaf.shape[0]} layers; expected a checkpoint of a sane size")
        for layer in range(leaf.shape[0]):
            yield Entry(name.replace("{layer}", str(layer)), shape, path, layer, rule.layout)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that an exported checkpoint holds, buffers included: name -> shape."""
        buffers = {name: buffer.shape for name, buffer in self.extras.buffers.items()}
        return {name: entry.shape for name, entry in self.entries.items()} | buffers

    def check(self, found: Mapping[str, tuple[int, ...]], where: str, *, parts: Sequence[str] | None = None) -> None:
        """Compare names and shapes of a checkpoint with the table.

        Args:
            found: name -> shape.
            where: how messages call the checkpoint.
            parts: top-level keys of the parameter tree that are wanted; names of other parts may be there or not.

        Raises:
            UserError: naming a missing, surplus or misshapen key, with what was expected and found.
        """
        wanted = self.shapes()
        if parts is not None:
            wanted = {name: self.entries[name].shape for path in self.wanted(parts) for name in self.names(path)}
        # A tensor that is saved twice may also be saved under its second name only.
        stand_ins = {first for second, first in self.extras.twins.items() if second in found}
        missing = sorted(name for name in wanted if name not in found and name not in stand_ins)
        known = self.shapes().keys() | self.extras.twins.keys()
        surplus = sorted(
            name for name in found if name not in known and not any(re.fullmatch(p, name) for p in self.extras.ignored)
        )
        if missing:
            name = missing[0]
            near = difflib.get_close_matches(name, surplus[:500], 1) or surplus[:1]
            hint = f"; it has {shown(near[0])}, which is not expected" if near else ""
            raise UserError(
                f"{where}: key {shown(name)} is missing (expected shape {list(wanted[name])}; "
                f"{len(missing)} of {len(wanted)} keys are missing){hint}"
            )
        if surplus:
            raise UserError(
                f"{where}: key {shown(surplus[0])} of shape {list(found[surplus[0]])} is not expected by this config "
                f"({len(surplus)} such keys among {len(found)}); check that config.json belongs to these weights"
            )
        everything = self.shapes() | {second: wanted.get(first) for second, first in self.extras.twins.items()}
        for name in sorted(found):
            expected = everything.get(name)
            asked = name in wanted or name in self.extras.twins
            if asked and expected is not None and tuple(found[name]) != tuple(expected):
                raise UserError(f"{where}: key {shown(name)} has shape {list(found[name])}; expected {list(expected)}")

    def wanted(self, parts: Sequence[str] | None) -> list[Path]:
        """Paths of the leaves under the top-level keys ``parts`` (all for ``None``).

        Raises:
            UserError: if a part does not exist.
        """
        if parts is None:
            return list(self.leaves)
        tops = {path[0] for path in self.leaves}
        if unknown := [part for part in parts if part not in tops]:
            raise UserError(f"part {shown(unknown[0])} does not exist; expected some of {', '.join(sorted(tops))}")
        return [path for path in self.leaves if path[0] in parts]

    def names(self, path: Path) -> list[str]:
        """Torch names of one leaf, by layer."""
        return [entry.name for entry in self.leaves[path]]

    def path_shapes(self, found: Mapping[str, tuple[int, ...]], where: str) -> dict[Path, tuple[int, ...]]:
        """Shapes of the parameter tree that a checkpoint with tensors ``found`` imports to.

        Raises:
            UserError: as ``check``.
        """
        self.check(found, where)
        result = {}
        for path, entries in self.leaves.items():
            if not entries:
                result[path] = self.abstract[path].shape
                continue
            shape = tuple(found[entries[0].name])
            shape = shape if entries[0].layout.axes is None else tuple(shape[axis] for axis in entries[0].layout.axes)
            result[path] = shape if entries[0].layer is None else (len(entries), *shape)
        return result


def native_table(abstract: Mapping) -> Table:
    """The table of nd-jax's own files: a leaf is one tensor, named by its path, in JAX layout."""
    rules = [Rule("/".join(path), "/".join(path)) for path, _ in flatten(abstract)]
    return Table(rules, abstract)
