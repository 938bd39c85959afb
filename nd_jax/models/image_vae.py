"""The image autoencoder of SDXL (diffusers' AutoencoderKL). Images [B, H, W, 3] in [-1, 1], latents [B, H/8, W/8, 4].

Latents are scaled: ``encode`` gives moments as they are, ``decode`` takes latents divided by ``scaling_factor``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Definition
from nd_jax.models.image_blocks import Conv, Downsample, GroupNorm, PixelAttention, ResBlock, Upsample

EPS = 1e-6
Half = Literal["encoder", "decoder"]
Seen = dict[str, Array] | None


@dataclasses.dataclass(frozen=True)
class ImageVAEConfig:
    """Shape under the names of diffusers' config.json; SDXL's by default (83,653,863 parameters)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 0.13025
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = True

    class_name: ClassVar[str] = "AutoencoderKL"
    _fixed: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": None,
    }
    _types: ClassVar[dict[str, str]] = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

    def __post_init__(self) -> None:
        if bad := [channels for channels in self.block_out_channels if channels % self.norm_num_groups]:
            raise UserError(
                f"config key 'block_out_channels' contains {bad[0]}; expected multiples of 'norm_num_groups', "
                f"{self.norm_num_groups}"
            )

    @property
    def space_scale(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ImageVAEConfig:
        """Read an official config.json. Unknown keys are ignored; unsupported values raise ``UserError``."""
        for key, expected in cls._fixed.items():
            if config.get(key, expected) != expected:
                raise UserError(f"config key {key!r} is {config[key]!r}; only {expected!r} is supported")
        known = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        if "block_out_channels" in known:
            known["block_out_channels"] = tuple(known["block_out_channels"])
        made = cls(**known)
        for key, expected in cls._types.items():
            found = config.get(key)
            if found is not None and list(found) != [expected] * len(made.block_out_channels):
                raise UserError(f"config key {key!r} is {found!r}; only {expected} for every level is supported")
        return made

    def to_dict(self) -> dict[str, Any]:
        """Content of the official config.json."""
        values = dataclasses.asdict(self)
        values["block_out_channels"] = list(self.block_out_channels)
        types = {key: [name] * len(self.block_out_channels) for key, name in self._types.items()}
        head = {"_class_name": self.class_name, "_diffusers_version": "0.34.0"}
        return dict(sorted({**head, **self._fixed, **types, **values}.items()))


class _Middle(nnx.Module):
    """Residual block, attention (if the config has it), residual block."""

    def __init__(self, config: ImageVAEConfig, channels: int, **kw: Any):
        groups = config.norm_num_groups
        self.resnets = nnx.List(ResBlock(channels, channels, groups, EPS, **kw) for _ in range(2))
        has = config.mid_block_add_attention
        self.attentions = nnx.List([PixelAttention(channels, groups, EPS, **kw)] if has else [])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Level(nnx.Module):
    """Residual blocks, then resampling unless it is the last level."""

    def __init__(self, config: ImageVAEConfig, inputs: int, outputs: int, count: int, resample: str | None, **kw: Any):
        self.resnets = nnx.List(
            ResBlock(outputs if index else inputs, outputs, config.norm_num_groups, EPS, **kw) for index in range(count)
        )
        # Pixels are added at the right and at the bottom only, unlike the UNet's downsampler.
        self.downsamplers = nnx.List([Downsample(outputs, (0, 1), **kw)] if resample == "down" else [])
        self.upsamplers = nnx.List([Upsample(outputs, **kw)] if resample == "up" else [])

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        for block in self.resnets:
            x = block(x)
        for resample in self.downsamplers:
            x = resample(x)
        for resample in self.upsamplers:
            x = resample(x, (2 * x.shape[1], 2 * x.shape[2]))
        return x


class ImageEncoder(nnx.Module):
    """Images to moments, before ``quant_conv``."""

    def __init__(self, config: ImageVAEConfig, **kw: Any):
        channels = config.block_out_channels
        self.conv_in = Conv(config.in_channels, channels[0], **kw)
        self.down_blocks = nnx.List(
            _Level(config, before, after, config.layers_per_block, "down" if index < len(channels) - 1 else None, **kw)
            for index, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False))
        )
        self.mid_block = _Middle(config, channels[-1], **kw)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 m"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class ImageDecoder(nnx.Module):
    """Latents after ``post_quant_conv`` to images."""

    def __init__(self, config: ImageVAEConfig, **kw: Any):
        channels = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, channels[0], **kw)
        self.mid_block = _Middle(config, channels[0], **kw)
        self.up_blocks = nnx.List(
            _Level(
                config, before, after, config.layers_per_block + 1, "up" if index < len(channels) - 1 else None, **kw
            )
            for index, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False))
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = Conv(channels[-1], config.out_channels, **kw)

    def __call__(self, z: Float[Array, "b h w c"], seen: Seen = None) -> Float[Array, "b h2 w2 3"]:
        seen = {} if seen is None else seen
        x = seen["conv_in"] = self.conv_in(z)
        x = seen["mid"] = self.mid_block(x)
        for index, block in enumerate(self.up_blocks):
            x = seen[f"up_{index}"] = block(x)
        x = seen["conv_norm_out"] = self.conv_norm_out(x)
        return self.conv_out(jax.nn.silu(x))


class ImageVAE(nnx.Module):
    """Encoder and decoder with the 1x1 convolutions on both sides of the latent; or one ``half`` of that."""

    def __init__(self, config: ImageVAEConfig, *, half: Half | None = None, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        kw, latent = {"dtype": dtype, "rngs": rngs}, config.latent_channels
        if half != "decoder":
            self.encoder = ImageEncoder(config, **kw)
            self.quant_conv = Conv(2 * latent, 2 * latent, 1, **kw) if config.use_quant_conv else None
        if half != "encoder":
            self.decoder = ImageDecoder(config, **kw)
            self.post_quant_conv = Conv(latent, latent, 1, **kw) if config.use_post_quant_conv else None

    def encode(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 m"]:
        """Moments, mean first; not scaled."""
        moments = self.encoder(image)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, latent: Float[Array, "b h w c"], activations: Seen = None) -> Float[Array, "b h2 w2 3"]:
        """Images, not clamped, of latents that were divided by ``scaling_factor``.

        ``activations``, if given, is filled with the output of every stage.
        """
        z = latent if self.post_quant_conv is None else self.post_quant_conv(latent)
        if activations is not None:
            activations["post_quant_conv"] = z
        return self.decoder(z, activations)

    def __call__(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """``decode`` of latents as the UNet makes them."""
        return self.decode(latent / self.config.scaling_factor)


def definition(config: ImageVAEConfig, *, half: Half | None = None, dtype=jnp.float32) -> Definition:
    """The autoencoder (or a half of it) that computes in ``dtype``; norms and softmax in float32."""
    return Definition(lambda rngs: ImageVAE(config, half=half, dtype=dtype, rngs=rngs))
