"""Configuration of the first-frame UNet, as diffusers' ``config.json`` of a UNet2DConditionModel spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from nd_jax.errors import UserError

PLAIN_DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
PLAIN_UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
PLAIN_MIDDLE, CROSS_MIDDLE = "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"

MOST_DEPTH = 1000  # a config is somebody else's

Depths = int | tuple[int, ...]
"""Transformer blocks of every attention layer of a level: one number for all of them, or one each."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """SDXL's family; SSD-1B by default (1,331,334,404 parameters).

    ``attention_head_dim`` is the NUMBER OF HEADS of each level, as in the official files.
    ``reverse_transformer_layers_per_block`` runs from the deepest up block outwards; ``None`` mirrors the down blocks.
    ``time_cond_proj_dim``: channels of the guidance embedding that latent-consistency students have.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = (PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN)
    mid_block_type: str = PLAIN_MIDDLE
    up_block_types: tuple[str, ...] = (CROSS_UP, CROSS_UP, PLAIN_UP)
    transformer_layers_per_block: tuple[Depths, ...] = (1, (2, 2), (4, 4))
    reverse_transformer_layers_per_block: tuple[Depths, ...] | None = ((4, 4, 10), (2, 1, 1), 1)
    attention_head_dim: tuple[int, ...] = (5, 10, 20)
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    time_cond_proj_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 128

    class_name: ClassVar[str] = "UNet2DConditionModel"
    _fixed: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dropout": 0.0,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "upcast_attention": False,
        "use_linear_projection": True,
    }
    """Keys of the official file that we write with these values and refuse with any other."""

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        lists = {
            "down_block_types": self.down_block_types,
            "up_block_types": self.up_block_types,
            "transformer_layers_per_block": self.transformer_layers_per_block,
            "reverse_transformer_layers_per_block": self.reverse_transformer_layers_per_block,
            "attention_head_dim": self.attention_head_dim,
        }
        for key, value in lists.items():
            if value is not None and len(value) != levels:
                raise UserError(f"config key {key!r} has {len(value)} entries; expected {levels}, one for each level")
        kinds = {
            "down_block_types": (PLAIN_DOWN, CROSS_DOWN),
            "mid_block_type": (PLAIN_MIDDLE, CROSS_MIDDLE),
            "up_block_types": (PLAIN_UP, CROSS_UP),
        }
        for key, known in kinds.items():
            found = getattr(self, key)
            for name in (found,) if isinstance(found, str) else found:
                if name not in known:
                    raise UserError(f"config key {key!r} is {name!r}; supported: {', '.join(known)}")
        for channels, heads in zip(self.block_out_channels, self.attention_head_dim, strict=True):
            if channels % self.norm_num_groups or channels % heads:
                raise UserError(
                    f"config key 'block_out_channels' has {channels}; expected multiples of 'norm_num_groups', "
                    f"{self.norm_num_groups}, and of the level's number of heads, {heads}"
                )
        for down in (True, False):
            for level in range(levels):
                self.depths(level, down=down)

    @property
    def time_channels(self) -> int:
        """Width of the conditioning vector."""
        return 4 * self.block_out_channels[0]

    @property
    def pooled_channels(self) -> int:
        """Width of the pooled text: what the six sinusoids leave of the added embedding's input."""
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    def depths(self, level: int, *, down: bool) -> tuple[int, ...]:
        """Transformer blocks of each attention layer of down block ``level``, or up block (0 is the deepest).

        Empty for a level without attention. Raises ``UserError`` for the wrong number of entries.
        """
        key, count = "transformer_layers_per_block", self.layers_per_block
        if down:
            kind, given = self.down_block_types[level], self.transformer_layers_per_block[level]
        else:
            kind, count = self.up_block_types[level], count + 1
            key = f"reverse_{key}"
            listed = self.reverse_transformer_layers_per_block
            if listed is None:
                listed = self.transformer_layers_per_block[::-1]
            given = listed[level]
        if kind in (PLAIN_DOWN, PLAIN_UP):
            return ()
        deepest = given if isinstance(given, int) else max(given, default=0)
        if not 1 <= deepest <= MOST_DEPTH:
            raise UserError(f"config key {key!r} has {deepest}; expected 1 to {MOST_DEPTH} transformer blocks")
        if isinstance(given, int):
            return (given,) * count
        if len(given) != count:
            raise UserError(f"config key {key!r} has {list(given)}; expected {count} numbers, one per attention layer")
        return tuple(given)

    @property
    def middle_depth(self) -> int | None:
        """Transformer blocks of the middle block; ``None`` for one without attention."""
        if self.mid_block_type == PLAIN_MIDDLE:
            return None
        last = self.transformer_layers_per_block[-1]
        return last if isinstance(last, int) else last[0]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read an official config.json. Unknown keys are ignored; unsupported values raise ``UserError``."""
        for key, expected in cls._fixed.items():
            if config.get(key, expected) != expected:
                raise UserError(f"config key {key!r} is {config[key]!r}; only {expected!r} is supported")
        known = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        levels = len(known.get("block_out_channels", cls.block_out_channels))
        for key in ("attention_head_dim", "transformer_layers_per_block"):
            if isinstance(known.get(key), int):
                known[key] = [known[key]] * levels
        known.setdefault("reverse_transformer_layers_per_block", None)
        return cls(**{key: _tuples(value) for key, value in known.items()})

    def to_dict(self) -> dict[str, Any]:
        """Content of the official config.json."""
        own = {field.name: _lists(getattr(self, field.name)) for field in dataclasses.fields(self)}
        head = {"_class_name": self.class_name, "_diffusers_version": "0.34.0"}
        return dict(sorted({**head, **self._fixed, **own}.items()))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, tuple) else value
