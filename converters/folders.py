"""Folders of several networks and their tokenizers, in the layout of the official release.

The hybrid and the monolithic release share one layout; they differ in the names of denoiser and context adapter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nd_jax.checked_files import parse_json, read_bytes, read_json, shown
from nd_jax.converters.component import load_component, write_component
from nd_jax.converters.kinds import detect_kind
from nd_jax.converters.pickles import PICKLES, refuse_pickle
from nd_jax.converters.safetensors_write import SHARD_SIZE
from nd_jax.errors import UserError
from nd_jax.outputs import new_folder

# Component folder -> kind. The last two are not in the official release: super-resolution networks come with the AIMET
# model zoo, safety checkers with Stable Diffusion.
OFFICIAL: dict[str, str] = {
    "context_adapter": "context_adapter",
    "context_adapter_multistep_t2v": "context_adapter",
    "diffusion_transformer_320p": "mmdit",
    "diffusion_transformer_320p_multistep_t2v": "mmdit",
    "causal_video_vae": "video_vae",
    "text_encoder": "clip",
    "text_encoder_2": "clip",
    "text_encoder_3": "t5",
    "ssd_1b_vae": "image_vae",
    "ssd_1b_unet": "unet",
    "ssd_1b_text_encoder": "clip",
    "ssd_1b_text_encoder_2": "clip",
    "super_resolution": "quicksrnet",
    "safety_checker": "safety_checker",
}
MODES: dict[str, dict[str, str]] = {
    "hybrid": {"context_adapter": "context_adapter", "diffusion_transformer": "diffusion_transformer_320p"},
    "monolithic": {
        "context_adapter": "context_adapter_multistep_t2v",
        "diffusion_transformer": "diffusion_transformer_320p_multistep_t2v",
    },
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "ssd_1b_tokenizer", "ssd_1b_tokenizer_2")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOKENIZER_LIMIT = 64 << 20
MARK = "nd_jax.json"


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer, checked: regular, of bounded size, JSON where the name says so.

    Raises:
        UserError: if a file is damaged or a link, or if there is no vocabulary.
    """
    files = {}
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            files[name] = read_bytes(folder / name, _TOKENIZER_LIMIT, "tokenizer file")
            if name.endswith(".json"):
                parse_json(files[name], str(folder / name))
    if not ({"vocab.json", "merges.txt"} <= files.keys() or {"spiece.model", "tokenizer.json"} & files.keys()):
        raise UserError(
            f"{folder} has no vocabulary; expected vocab.json with merges.txt, spiece.model, or tokenizer.json"
        )
    return files


@dataclass(frozen=True)
class Folder:
    """What a checkpoint folder holds; nothing is read until asked for.

    ``components``: name -> folder; ``kinds``: name -> kind; ``tokenizers``: name -> folder; ``skipped``: name -> class
    of networks that nd-jax does not have.
    """

    path: Path
    components: Mapping[str, Path]
    kinds: Mapping[str, str]
    tokenizers: Mapping[str, Path]
    skipped: Mapping[str, str]

    @property
    def single(self) -> bool:
        """Whether the path is itself one component."""
        return list(self.components.values()) == [self.path]

    def name_of(self, role: str, mode: str | None = None) -> str:
        """Folder name of ``role``: "diffusion_transformer", "context_adapter", or any component's own name.

        Args:
            role: what is wanted.
            mode: "hybrid" or "monolithic" for the two roles whose name depends on it; ``None`` takes the one present.

        Raises:
            UserError: if it is not there, or if both modes are and ``mode`` does not choose.
        """
        if mode is not None and mode not in MODES:
            raise UserError(f"mode {shown(mode)} does not exist; expected {' or '.join(MODES)}")
        modes = [mode] if mode else list(MODES)
        names = list(dict.fromkeys(MODES[each].get(role, role) for each in modes))
        found = [name for name in names if name in self.components]
        if len(found) > 1:
            raise UserError(
                f"{self.path} has both {found[0]} and {found[1]}; choose one with mode hybrid or monolithic"
            )
        if not found:
            raise UserError(
                f"{self.path} has no {' or '.join(names)}; it has {', '.join(self.components) or 'nothing'}"
            )
        return found[0]

    def has(self, role: str, mode: str | None = None) -> bool:
        """Whether ``name_of`` would find a folder."""
        names = [MODES[each].get(role, role) for each in ([mode] if mode else MODES)]
        return any(name in self.components for name in names)

    def load(
        self, name: str, *, dtype: object | None = None, sharding: Any = None, parts: Sequence[str] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Config and parameters of one component; see ``load_component``."""
        if name not in self.components:
            raise UserError(f"{self.path} has no {name}; it has {', '.join(self.components) or 'no component'}")
        return load_component(self.components[name], self.kinds[name], dtype=dtype, sharding=sharding, parts=parts)


def _subfolders(path: Path) -> list[Path]:
    found = []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and (entry.name in OFFICIAL or entry.name in TOKENIZERS):
            raise UserError(f"{path / entry.name} is a symbolic link; copy the folder with `cp -rL` and use the copy")
        if entry.is_dir(follow_symlinks=False):
            found.append(path / entry.name)
    return found


def load_folder(path: str | os.PathLike) -> Folder:
    """See what a folder holds: an official release, nd-jax's own form of it, or a single component.

    Raises:
        UserError: if it is not a folder, holds no component, or a component is of another kind than its name says.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in PICKLES:
        refuse_pickle(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; expected a checkpoint folder")
    if (path / "config.json").exists():
        kind = detect_kind(read_json(path / "config.json", what="config"), str(path / "config.json"))
        name = path.resolve().name
        return Folder(path, {name: path}, {name: kind.name}, {}, {})
    components, kinds, tokenizers, skipped = {}, {}, {}, {}
    for folder in _subfolders(path):
        name = folder.name
        if name in TOKENIZERS or (folder / "tokenizer_config.json").exists() or (folder / "spiece.model").exists():
            tokenizers[name] = folder
        elif name in OFFICIAL or (folder / "config.json").exists():
            where = str(folder / "config.json")
            try:
                kind = detect_kind(read_json(folder / "config.json", what="config"), where).name
            except UserError:
                if name in OFFICIAL:
                    raise
                skipped[name] = where
                continue
            if OFFICIAL.get(name, kind) != kind:
                raise UserError(f"{folder} holds a {kind} network; expected {OFFICIAL[name]} under this name")
            components[name], kinds[name] = folder, kind
    if not components:
        raise UserError(
            f"{path} is not a checkpoint folder: no component in it; expected folders such as "
            "diffusion_transformer_320p with config.json and safetensors weights"
        )
    return Folder(path, components, kinds, tokenizers, skipped)


class FolderWriter:
    """Writes the components of one folder, one after another. Made by ``write_folder``."""

    def __init__(self, path: Path, dtype: object | None, shard_size: int, native: bool):
        self.path, self.dtype, self.shard_size, self.native = path, dtype, shard_size, native

    def component(self, name: str, config: Any, params: Mapping[str, Any]) -> None:
        """One network. ``name`` is its folder; an empty name writes into the folder itself."""
        folder = self.path / name if name else self.path
        folder.mkdir(exist_ok=not name)
        write_component(folder, config, params, dtype=self.dtype, shard_size=self.shard_size, native=self.native)

    def tokenizer(self, name: str, source: str | os.PathLike) -> None:
        """A tokenizer, copied byte by byte after its files have been checked."""
        files = read_tokenizer(Path(source))
        (self.path / name).mkdir()
        for file, content in files.items():
            (self.path / name / file).write_bytes(content)

    def json(self, name: str, content: Mapping[str, Any]) -> None:
        """A JSON file at the top."""
        (self.path / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def write_folder(
    path: str | os.PathLike,
    *,
    dtype: object | None = None,
    shard_size: int = SHARD_SIZE,
    native: bool = False,
    overwrite: bool = False,
) -> Iterator[FolderWriter]:
    """A ``FolderWriter`` whose folder appears under ``path`` when the block ends, or not at all.

    Args:
        path: must not exist, unless ``overwrite``.
        dtype: "fp32", "bf16" or "fp16" for every parameter; ``None`` keeps their own.
        shard_size: bytes after which a new file begins.
        native: nd-jax's own form instead of the official one.
        overwrite: replace an existing folder.

    Raises:
        UserError: if the output exists, or something does not fit.
    """
    with new_folder(path, overwrite=overwrite) as temporary:
        yield FolderWriter(temporary, dtype, shard_size, native)


def save_folder(
    path: str | os.PathLike,
    components: Mapping[str, tuple[Any, Mapping[str, Any]]],
    tokenizers: Mapping[str, str | os.PathLike] | None = None,
    **options: Any,
) -> None:
    """Write networks that are in memory: ``components`` maps a folder name to (config, params).

    ``tokenizers`` maps a folder name to a folder to copy; ``options`` are those of ``write_folder``.
    """
    with write_folder(path, **options) as writer:
        for name, (config, params) in components.items():
            writer.component(name, config, params)
        for name, source in (tokenizers or {}).items():
            writer.tokenizer(name, source)
