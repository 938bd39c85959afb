"""Reading a golden folder that nobody vouches for.

A case is a folder with config.json, meta.json, inputs.npz and outputs.npz, often weights.safetensors or a checkpoint/
folder. Array names are ``SUBCASE/NAME``. Nothing is unpickled, sizes are checked before memory is taken, and no path
leads out of the folder given.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError

Outputs = Iterator[tuple[str, Any]]
"""What a subcase recomputes: pairs of output name and array."""

MAX_JSON_BYTES = 64 << 20
MAX_ARRAY_BYTES = 4 << 30  # all arrays of one npz together
MAX_ARRAYS = 100_000
TABLES = ("stage_length_table",)
SOURCES = ("input_of", "uses_inputs_of", "latents_of")  # meta.json's words for "its inputs are those of ..."


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of limited size. Raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"golden case: {path} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"golden case: {path} has {path.stat().st_size} bytes; expected at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"golden case: {path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"golden case: {path} holds a {type(value).__name__}; expected an object")
    return value


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy version {version}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if dtype.kind not in "biuf":  # objects would be pickles
            raise UserError(
                f"golden case: {path}, array {member.filename[:-4]!r} has dtype {dtype}; "
                "expected plain numbers (pickled objects are refused)"
            )
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > member.file_size:
            raise ValueError(f"{member.filename} claims shape {shape}, but has {member.file_size} bytes")
        data = stream.read(size)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an npz file, by name. Raises ``UserError`` for pickles, oversized or damaged files."""
    if not path.is_file():
        raise UserError(f"golden case: {path} is missing")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if len(members) > MAX_ARRAYS or total > MAX_ARRAY_BYTES:
                raise UserError(
                    f"golden case: {path} has {len(members)} arrays of {total} bytes; "
                    f"expected at most {MAX_ARRAYS} and {MAX_ARRAY_BYTES}"
                )
            return {m.filename.removesuffix(".npy"): _read_member(archive, m, path) for m in members}
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"golden case: {path} is not a readable npz file ({error})") from None


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case. ``root`` is the folder of all cases; nothing outside of it is ever read.

    Networks compute in ``dtype``.
    """

    folder: Path
    root: Path
    dtype: Any = np.float32

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.file("config.json"))

    @cached_property
    def meta(self) -> dict[str, Any]:
        return read_json(self.file("meta.json"))

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return read_arrays(self.file("inputs.npz"))

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        """Expected arrays; a table in a JSON file beside them counts as a subcase of the file's name."""
        found = read_arrays(self.file("outputs.npz"))
        for name in TABLES:
            if self.file(f"{name}.json").is_file():
                for key, rows in read_json(self.file(f"{name}.json")).get("table", {}).items():
                    found[f"{name}/{key}"] = np.asarray(rows)
        return found

    def file(self, name: str) -> Path:
        """Path of a file of the case. Raises ``UserError`` where it leads out of the golden folder."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"golden case: {path} leads out of {self.root}; expected a file inside of it")
        return path

    def sibling(self, name: Any) -> Case:
        """The case that meta.json names as the owner of the weights."""
        if not isinstance(name, str) or name != Path(name).name:
            raise UserError(f"golden case {self.name}: {name!r} is not a case name")
        other = Case(self.folder.parent / name, self.root, self.dtype)
        if not other.file("config.json").is_file():
            raise UserError(f"golden case {self.name} needs the case {name!r}, which is not in {self.folder.parent}")
        return other

    def same_config(self) -> Iterator[Case]:
        """Other cases beside this one with an equal config.json and weights."""
        for case in find_cases(self.folder.parent, self.dtype):
            if case.name != self.name and case.file("weights.safetensors").is_file() and case.config == self.config:
                yield case

    def about(self, subcase: str) -> dict[str, Any]:
        """What meta.json says of a subcase; empty if nothing."""
        subcases = self.meta.get("subcases", {})
        about = subcases.get(subcase, {}) if isinstance(subcases, Mapping) else {}
        if not isinstance(about, dict):
            raise UserError(f"golden case {self.name}: meta.json's entry of {subcase!r} is not an object")
        return about

    def subcases(self) -> Iterator[Subcase]:
        """Every subcase that has outputs, in the order of the file."""
        seen: dict[str, None] = {}
        for name in self.outputs:
            seen.setdefault(name.split("/", 1)[0])
        for name in seen:
            yield Subcase(self, name)


@dataclasses.dataclass(frozen=True)
class Subcase:
    """A subcase: its own arrays, and those of the subcase whose inputs it shares."""

    case: Case
    name: str

    def __str__(self) -> str:
        return f"golden case {self.case.name}, subcase {self.name}"

    @cached_property
    def about(self) -> dict[str, Any]:
        return self.case.about(self.name)

    def _own(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        cut = len(self.name) + 1
        return {name[cut:]: array for name, array in arrays.items() if name.startswith(self.name + "/")}

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """Its inputs by NAME; missing ones come from the subcase that meta.json names as their owner."""
        found, subcase, visited = {}, self, set()
        while subcase.name not in visited:
            visited.add(subcase.name)
            found = subcase._own(self.case.inputs) | found
            owner = next((subcase.about[key] for key in SOURCES if key in subcase.about), subcase.name)
            subcase = Subcase(self.case, str(owner))
        return found or self._namesake()

    def _namesake(self) -> dict[str, np.ndarray]:
        """Inputs of the subcase with the longest name that this one's name extends, for want of a named owner."""
        owners = {name.split("/", 1)[0] for name in self.case.inputs}
        owners = {name for name in owners if self.name.startswith(name + "_")}
        return Subcase(self.case, max(owners, key=len))._own(self.case.inputs) if owners else {}

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        """Its expected outputs by NAME."""
        return self._own(self.case.outputs)

    def input(self, name: str) -> np.ndarray:
        """One input. Raises ``UserError`` if it is not there."""
        if name not in self.inputs:
            raise UserError(f"{self}: input {name!r} is missing; it has {', '.join(sorted(self.inputs)) or 'none'}")
        return self.inputs[name]

    def input_list(self, name: str) -> list[np.ndarray]:
        """Inputs ``NAME/0``, ``NAME/1``, ... in numeric order."""
        found = {key[len(name) + 1 :]: value for key, value in self.inputs.items() if key.startswith(name + "/")}
        if not all(key.isdigit() for key in found):
            raise UserError(f"{self}: inputs {name}/... are not a numbered list ({', '.join(sorted(found))})")
        return [found[key] for key in sorted(found, key=int)]

    def parameter(self, name: str, *kinds: type) -> Any:
        """A value from meta.json. Raises ``UserError`` if it is missing or of another type."""
        value = self.about.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(
                f"{self}: meta.json's {name!r} is {value!r}; expected {' or '.join(k.__name__ for k in kinds)}"
            )
        return value


def find_cases(folder: Path, dtype: Any = np.float32) -> list[Case]:
    """The cases in ``folder`` (or ``folder`` itself, if it is one), by name. Raises ``UserError`` if there is none.

    A folder with any of a case's files counts, so that an incomplete one is an error and not overlooked.
    """
    if not folder.is_dir():
        raise UserError(f"golden folder: {folder} is not a folder")

    def is_case(path: Path) -> bool:
        return path.is_dir() and any((path / name).exists() for name in ("meta.json", "inputs.npz", "outputs.npz"))

    if is_case(folder):
        folder = folder.resolve()
        return [Case(folder, folder.parent, dtype)]
    cases = [Case(path, folder, dtype) for path in sorted(folder.iterdir()) if is_case(path)]
    if not cases:
        raise UserError(
            f"golden folder: no case in {folder}; expected folders with config.json, meta.json and npz files"
        )
    return cases
