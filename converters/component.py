"""One network on disk: its kind, its config.json and its weights, in the official form or in nd-jax's own.

Both forms are a folder with the official config.json. The official form has torch names and layouts in
``diffusion_pytorch_model.safetensors`` or ``model.safetensors``; nd-jax's own has ``params.safetensors`` with one
tensor per leaf of the parameter tree, named by its path and laid out as JAX wants it. Either may be sharded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.checked_files import read_json, shown
from nd_jax.converters.checkpoint_files import Checkpoint, open_checkpoint
from nd_jax.converters.dtypes import STORED, TORCH_NAME, parameter_dtype
from nd_jax.converters.kinds import TRANSFORMERS, WRONG_VALUE, Kind, detect_kind, get_kind, kind_of, read_config
from nd_jax.converters.safetensors_io import StoredTensor
from nd_jax.converters.safetensors_write import SHARD_SIZE, write_checkpoint
from nd_jax.converters.tables import Table, flatten
from nd_jax.converters.transfer import Shardings, load_params, pending_tensors
from nd_jax.errors import UserError
from nd_jax.outputs import new_folder

NATIVE_STEM = "params"
_WRAPPER = "dit."  # training checkpoints keep the denoiser under this prefix, beside vae.* and text_encoder.*


def _strip_wrapper(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    if not any(name.startswith(_WRAPPER) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items() if name.startswith(_WRAPPER)}


@dataclass
class OpenComponent:
    """A component folder whose config and headers have been read, but no array yet. Close it after use."""

    kind: Kind
    config: Any
    table: Table
    tensors: dict[str, StoredTensor]
    where: str
    checkpoint: Checkpoint

    def __enter__(self) -> OpenComponent:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    def load(
        self, *, dtype: object | None = None, sharding: Shardings | None = None, parts: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The parameter tree; see ``load_component``."""
        return load_params(self.table, self.tensors, self.where, dtype=dtype, sharding=sharding, parts=parts)


def open_component(folder: str | os.PathLike, kind: str | None = None) -> OpenComponent:
    """Open a component folder of either form; names and shapes are compared with the config by ``load``.

    Args:
        folder: with config.json and weights.
        kind: one of ``KINDS``, or ``None`` to let config.json say it.

    Raises:
        UserError: for a wrong folder, config, or file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one with config.json and safetensors weights")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; expected a component folder of an official checkpoint")
    where = str(folder / "config.json")
    content = read_json(folder / "config.json", what="config")
    found = get_kind(kind) if kind else detect_kind(content, where)
    classes = content.get("architectures") or [content.get("_class_name")]
    if kind and isinstance(classes, list) and classes != [None] and not set(map(str, classes)) & set(found.classes):
        raise UserError(f"{where} is for {shown(classes[0])}; expected {' or '.join(found.classes)}")
    checkpoint = open_checkpoint(folder)
    try:
        native = checkpoint.where.name.startswith(f"{NATIVE_STEM}.")
        tensors = dict(checkpoint) if native or found.name != "mmdit" else _strip_wrapper(checkpoint)
        config = read_config(found, content, where, set(tensors))
        try:
            table = found.native_table(config) if native else found.table(config)
        except WRONG_VALUE as error:
            raise UserError(f"{where} does not describe a network that can be built ({error})") from None
        return OpenComponent(found, config, table, tensors, str(checkpoint.where), checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def load_component(
    folder: str | os.PathLike,
    kind: str | None = None,
    *,
    dtype: object | None = None,
    sharding: Shardings | None = None,
    parts: Sequence[str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Config and parameters of a component folder, in the official form or in nd-jax's own.

    Args:
        folder: with config.json and weights.
        kind: one of ``KINDS``, or ``None`` to let config.json say it.
        dtype: "fp32", "bf16" or "fp16"; ``None`` keeps what is stored.
        sharding: one ``Sharding`` for every leaf, or a nested dict of them; every process reads its own slices only.
        parts: only these top-level keys of the parameter tree, e.g. ``("encoder", "quant_conv")``; the file may then
            lack the others.

    Returns:
        The config dataclass and a nested dict of ``jax.Array``.

    Raises:
        UserError: for anything that is wrong with the folder, naming file, key, expectation and finding.
    """
    with open_component(folder, kind) as component:
        return component.config, component.load(dtype=dtype, sharding=sharding, parts=parts)


def write_component(
    folder: Path,
    config: Any,
    params: Mapping[str, Any],
    *,
    dtype: object | None = None,
    shard_size: int = SHARD_SIZE,
    native: bool = False,
) -> None:
    """Write config.json and weights into an existing (temporary) folder; see ``save_component``."""
    kind = kind_of(config)
    content = config.to_dict()
    dtypes = {parameter_dtype(dtype) or np.dtype(leaf.dtype) for _, leaf in flatten(params)}
    if kind.stem == TRANSFORMERS:
        content["torch_dtype"] = TORCH_NAME[dtypes.pop() if len(dtypes) == 1 else STORED["F32"]]
    table = kind.native_table(config) if native else kind.table(config)
    stem, metadata = (NATIVE_STEM, {"format": "nd-jax"}) if native else (kind.stem, {"format": "pt"})
    write_checkpoint(
        folder, stem, pending_tensors(table, params, dtype=dtype), shard_size=shard_size, metadata=metadata
    )
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_component(
    folder: str | os.PathLike,
    config: Any,
    params: Mapping[str, Any],
    *,
    dtype: object | None = None,
    shard_size: int = SHARD_SIZE,
    native: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a component folder, whole or not at all.

    Args:
        folder: must not exist, unless ``overwrite``.
        config: the network's config dataclass, which also says the kind.
        params: nested dict of arrays, one tensor of which is copied at a time.
        dtype: "fp32", "bf16" or "fp16"; ``None`` keeps each parameter's own.
        shard_size: bytes after which a new file begins.
        native: nd-jax's own form instead of the official one.
        overwrite: replace an existing folder.

    Raises:
        UserError: if the folder exists, or parameters and config do not belong together.
    """
    with new_folder(folder, overwrite=overwrite) as temporary:
        write_component(temporary, config, params, dtype=dtype, shard_size=shard_size, native=native)
