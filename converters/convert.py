"""``nd-jax convert import`` and ``export``: official PyTorch folders to nd-jax's own form, and back."""

from __future__ import annotations

import os
from pathlib import Path

from nd_jax.checked_files import read_json
from nd_jax.converters.component import open_component
from nd_jax.converters.dtypes import parameter_dtype
from nd_jax.converters.folders import MARK, load_folder, write_folder
from nd_jax.converters.safetensors_write import SHARD_SIZE
from nd_jax.errors import UserError
from nd_jax.outputs import check_new

FORMAT_VERSION = 1
KEPT = ("generation_config.json", "model_index.json", "pruning.json")
"""Files at the top that are carried along: they say how the networks are used."""


def _convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: str | None,
    *,
    native: bool,
    overwrite: bool,
    shard_size: int,
) -> list[str]:
    parameter_dtype(dtype)
    folder = load_folder(source)
    target = Path(os.path.abspath(destination))
    inside = folder.path.resolve()
    if target.resolve() == inside or inside in target.resolve().parents or target.resolve() in inside.parents:
        raise UserError(f"output {target} and input {folder.path} are nested; name an output folder elsewhere")
    check_new(target, overwrite=overwrite)
    if shard_size < 1:
        raise UserError(f"shard size {shard_size} is not positive; expected bytes, such as {SHARD_SIZE}")
    with write_folder(target, dtype=dtype, shard_size=shard_size, native=native, overwrite=overwrite) as writer:
        for name, path in folder.components.items():
            with open_component(path, folder.kinds[name]) as component:
                writer.component("" if folder.single else name, component.config, component.load(dtype=dtype))
        for name, path in folder.tokenizers.items():
            writer.tokenizer(name, path)
        for name in KEPT:
            if (folder.path / name).is_file() and not folder.single:
                writer.json(name, read_json(folder.path / name, what="settings"))
        if native:
            writer.json(MARK, {"format_version": FORMAT_VERSION, "components": dict(folder.kinds)})
    return [f"left out {name}: nd-jax has no network for {what}" for name, what in folder.skipped.items()]


def convert_import(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
) -> list[str]:
    """Official PyTorch folder (or one component of it) to nd-jax's own form.

    At most one component's tree and one tensor are in memory. Tokenizers are copied.

    Args:
        source: official folder, Pyramid-Flow folder, or a single component folder.
        destination: new folder; the same component names with config.json and params.safetensors each.
        dtype: "fp32", "bf16", "fp16"; ``None`` keeps what is stored.
        overwrite: replace an existing destination.
        shard_size: bytes after which a new file begins.

    Returns:
        One line per thing that was left out.

    Raises:
        UserError: for anything wrong with the input or output; then nothing is written.
    """
    return _convert(source, destination, dtype, native=True, overwrite=overwrite, shard_size=shard_size)


def convert_export(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
) -> list[str]:
    """nd-jax's own form (or an official folder, to change its dtype) to an official PyTorch folder.

    Arguments, result and errors as ``convert_import``.
    """
    return _convert(source, destination, dtype, native=False, overwrite=overwrite, shard_size=shard_size)
