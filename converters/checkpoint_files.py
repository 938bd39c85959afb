"""A checkpoint in one safetensors file, or in shards with an index, as one mapping from name to tensor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from nd_jax.checked_files import read_json, shown
from nd_jax.converters.pickles import PICKLES, refuse_pickle
from nd_jax.converters.safetensors_io import StoredTensor, TensorFile
from nd_jax.errors import UserError

STEMS = ("diffusion_pytorch_model", "model", "params")  # as diffusers, transformers and nd-jax name their files
INDEX_LIMIT = 100_000_000


class Checkpoint(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint. Close it, or use it as a context manager."""

    def __init__(self, where: Path, tensors: dict[str, StoredTensor], files: list[TensorFile]):
        self.where = where
        self._tensors, self._files = tensors, files

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return sum(file.bytes_read for file in self._files)


def find_weights(folder: Path) -> Path:
    """The weights of a component folder: an index, the one file of a known name, or the only safetensors file.

    Raises:
        UserError: if there is none (pickles are refused by name), or more than one choice.
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    ends = (".safetensors", ".safetensors.index.json")
    found = [f"{stem}{end}" for stem in STEMS for end in ends if f"{stem}{end}" in names]
    found = found or [name for name in names if name.endswith(ends[1])] or [n for n in names if n.endswith(ends[0])]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise UserError(
            f"{folder} has {' and '.join(map(shown, found[:3]))}; expected one file or one index: "
            "remove what does not belong to this network"
        )
    for name in names:
        if name.lower().endswith((*PICKLES, *(f"{end}.index.json" for end in PICKLES))):
            refuse_pickle(folder / name.removesuffix(".index.json"))
    raise UserError(f"{folder} has no weights; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors")


def _shards(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, both checked to be plain names."""
    weight_map = read_json(index, INDEX_LIMIT, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; expected {{tensor name: file name}}")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and shard.isprintable()
        if not plain or "/" in shard or "\\" in shard or ":" in shard or shard.startswith("."):
            if isinstance(shard, str) and shard.lower().endswith(PICKLES) and "/" not in shard:
                refuse_pickle(index.parent / shard)
            raise UserError(
                f"{index} puts tensor {shown(name)} into {shown(shard)}; expected the plain name of a .safetensors "
                "file inside the same folder"
            )
    return weight_map


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a folder with one file or shards, an index, or a single safetensors file.

    Shards have to be regular files beside their index, and hold exactly the tensors that the index says.

    Raises:
        UserError: naming the file or tensor that is wrong.
    """
    path = Path(path)
    named = not path.is_dir()
    weights = path if named else find_weights(path)
    if not weights.name.endswith(".index.json"):
        file = TensorFile(weights, follow=named)
        return Checkpoint(weights, dict(file), [file])
    weight_map = _shards(weights)
    tensors: dict[str, StoredTensor] = {}
    with contextlib.ExitStack() as stack:
        files = []
        for shard in sorted(set(weight_map.values())):
            files.append(stack.enter_context(TensorFile(weights.parent / shard)))
            for name, tensor in files[-1].items():
                if weight_map.get(name) != shard:
                    place = f"in {shown(weight_map[name])}" if name in weight_map else "nowhere"
                    raise UserError(
                        f"{weights.parent / shard} holds tensor {shown(name)}, but its index puts it {place}"
                    )
                tensors[name] = tensor
        missing = sorted(weight_map.keys() - tensors.keys())
        if missing:
            raise UserError(
                f"{weights} puts tensor {shown(missing[0])} into {shown(weight_map[missing[0]])}, "
                f"which does not hold it ({len(missing)} such tensors); download the folder again"
            )
        stack.pop_all()
    return Checkpoint(weights, tensors, files)
