"""Configurations of the two video codecs, as their official ``config.json`` files spell them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from nd_jax.errors import UserError

_DOWN_BLOCK = "DownEncoderBlockCausal3D"
_UP_BLOCK = "UpDecoderBlockCausal3D"


@dataclass(frozen=True)
class CodecConfig:
    """The encoder both codecs share. Flag lists have one entry per level, in the order in which levels run."""

    encoder_in_channels: int = 3
    encoder_out_channels: int = 16
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    encoder_spatial_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_temporal_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_norm_num_groups: int = 32
    sample_size: int = 256
    latents_mean: tuple[tuple[float, ...], ...] | None = None
    """Measured latent means, rows (frame 0, later frames) by channel. Ours: official files have no such key."""
    latents_std: tuple[tuple[float, ...], ...] | None = None

    class_name: ClassVar[str] = ""
    _fixed: ClassVar[dict[str, Any]] = {}
    """Keys of the official file that we write with these values and refuse with any other."""

    def __post_init__(self) -> None:
        levels = len(self.encoder_block_out_channels)
        self._same_length("encoder_", levels, "layers_per_block", "spatial_down_sample", "temporal_down_sample")
        self._divisible("encoder_norm_num_groups", "encoder_block_out_channels")

    def _same_length(self, prefix: str, levels: int, *names: str) -> None:
        for name in names:
            if len(getattr(self, prefix + name)) != levels:
                raise UserError(
                    f"{self.class_name} config: {prefix}{name} has {len(getattr(self, prefix + name))} entries, "
                    f"expected {levels}, one for each level"
                )

    def _divisible(self, groups: str, channels: str) -> None:
        if bad := [c for c in getattr(self, channels) if c % getattr(self, groups)]:
            raise UserError(
                f"{self.class_name} config: {channels} contains {bad[0]}, expected multiples of {groups} = "
                f"{getattr(self, groups)}"
            )

    @property
    def space_scale(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** sum(self.encoder_spatial_down_sample)

    @property
    def time_scale(self) -> int:
        """Frames per latent frame after the first."""
        return 2 ** sum(self.encoder_temporal_down_sample)

    @property
    def tile_scale(self) -> int:
        """Pixels per latent as the official file states it, for the size of tiles."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> CodecConfig:
        """Read an official ``config.json``. Unknown keys are ignored; unsupported values raise ``UserError``."""
        name = config.get("_class_name", cls.class_name)
        if name != cls.class_name:
            raise UserError(f"config: _class_name is {name!r}, expected {cls.class_name!r}")
        for key, expected in cls._fixed.items():
            found = config.get(key, expected)
            ok = all(entry == expected[0] for entry in found) if isinstance(expected, list) else found == expected
            if not ok:
                raise UserError(f"{cls.class_name} config: {key} is {found!r}, only {expected!r} is supported")
        known = {field.name for field in fields(cls)}
        return cls(**{key: _tuples(value) for key, value in config.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The content of the official ``config.json``, keys sorted as the official writer sorts them."""
        own = {field.name: _lists(getattr(self, field.name)) for field in fields(self)}
        own = {key: value for key, value in own.items() if value is not None or not key.startswith("latents_")}
        levels = len(self.encoder_block_out_channels)
        fixed = {key: value * levels if isinstance(value, list) else value for key, value in self._fixed.items()}
        tail = {"_class_name": self.class_name, "_diffusers_version": "0.34.0"}
        return dict(sorted({**tail, **fixed, **own}.items()))


@dataclass(frozen=True)
class AsymmetricVAEConfig(CodecConfig):
    """``AsymmetricCausalVideoVAE``: the shared encoder with the small TAEHV decoder.

    ``decoder_space_upscale`` and ``decoder_time_upscale`` name the three transitions between the four levels of
    ``decoder_num_features``.
    """

    decoder_num_features: tuple[int, ...] = (256, 128, 64, 64)
    decoder_space_upscale: tuple[bool, ...] = (True, True, True)
    decoder_time_upscale: tuple[bool, ...] = (True, True, True)
    spatial_downsample_scale: int = 8
    temporal_downsample_scale: int = 8

    class_name: ClassVar[str] = "AsymmetricCausalVideoVAE"
    _fixed: ClassVar[dict[str, Any]] = {
        "encoder_act_fn": "silu",
        "encoder_block_dropout": [0.0],
        "encoder_down_block_types": [_DOWN_BLOCK],
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.decoder_num_features)
        self._same_length("decoder_", levels - 1, "space_upscale", "time_upscale")

    @property
    def tile_scale(self) -> int:
        return self.spatial_downsample_scale

    @property
    def frames_per_latent(self) -> int:
        """Video frames that the decoder makes of one latent frame, before the first ones are trimmed."""
        return 2 ** sum(self.decoder_time_upscale)


@dataclass(frozen=True)
class NativeVAEConfig(CodecConfig):
    """``CausalVideoVAE``: the shared encoder with its mirror image as decoder.

    The decoder's layer counts and flags are in decoding order, its channels in encoding order (read backwards).
    """

    decoder_in_channels: int = 16
    decoder_out_channels: int = 3
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    decoder_spatial_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_temporal_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_norm_num_groups: int = 32
    add_post_quant_conv: bool = True
    downsample_scale: int = 8
    scaling_factor: float = 0.18215

    class_name: ClassVar[str] = "CausalVideoVAE"
    _fixed: ClassVar[dict[str, Any]] = {
        "decoder_act_fn": "silu",
        "decoder_block_dropout": [0.0],
        "decoder_type": "causal_vae_conv",
        "decoder_up_block_types": [_UP_BLOCK],
        "encoder_act_fn": "silu",
        "encoder_block_dropout": [0.0],
        "encoder_double_z": True,
        "encoder_down_block_types": [_DOWN_BLOCK],
        "encoder_type": "causal_vae_conv",
        "interpolate": False,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.decoder_block_out_channels)
        self._same_length("decoder_", levels, "layers_per_block", "spatial_up_sample", "temporal_up_sample")
        self._divisible("decoder_norm_num_groups", "decoder_block_out_channels")
        if self.decoder_in_channels != self.encoder_out_channels:
            raise UserError(
                f"{self.class_name} config: decoder_in_channels is {self.decoder_in_channels}, expected "
                f"encoder_out_channels = {self.encoder_out_channels}"
            )

    @property
    def tile_scale(self) -> int:
        return self.downsample_scale


def config_from_dict(config: dict[str, Any]) -> AsymmetricVAEConfig | NativeVAEConfig:
    """The configuration named by ``_class_name``."""
    kinds = {kind.class_name: kind for kind in (AsymmetricVAEConfig, NativeVAEConfig)}
    name = config.get("_class_name")
    if name not in kinds:
        raise UserError(f"video codec config: _class_name is {name!r}, expected one of {', '.join(kinds)}")
    return kinds[name].from_dict(config)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, tuple) else value
