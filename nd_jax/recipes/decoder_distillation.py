"""Asymmetric decoder distillation (Neodragon, section 3.2): another decoder for latents that must not move.

The encoder is frozen, so the latents, and with them every denoiser trained on them, stay what they are; there is no KL
term. Loss = squared error to the video + LPIPS where its weights are given, else the terms of ``multiscale`` (the
paper: MSE + LPIPS); optionally also the native decoder's features, through one learned 1x1 map for each level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from nd_jax.errors import UserError
from nd_jax.models.causal_conv import uniform_fan_in
from nd_jax.models.causal_vae import NativeVAEConfig, definition, posterior
from nd_jax.models.codec_config import CodecConfig
from nd_jax.models.functional import Params
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.system import whole_kernels
from nd_jax.recipes.coarse_start import coarse_start
from nd_jax.recipes.multiscale import MultiscaleConfig, multiscale_terms
from nd_jax.recipes.perceptual import Lpips
from nd_jax.recipes.tiny_student import Level, TinyStudent, matching_levels, student_config
from nd_jax.training.optim import OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.sharding import Rules
from nd_jax.training.state import TrainState

ENCODER = ("encoder", "quant_conv")
DECODER = ("decoder", "post_quant_conv")
MATCH = "match"
"""The maps from the student's features to the native decoder's; not part of the result."""


@dataclass(frozen=True)
class DecoderRecipeConfig:
    """What a decoder run does besides its optimizer; the decoder's form as published (Neodragon) by default."""

    batch: int = 8
    """Clips per update."""
    frames: int = 17
    """Frames per clip, 1 + 8k. Decoders remember: windows of 9 frames would lose quality on long clips."""
    channels: tuple[int, ...] = (256, 128, 64, 64)
    """Of each level of the decoder, latents first."""
    space_growth: tuple[bool, ...] = (True, True, True)
    """Transitions between levels that double height and width."""
    time_growth: tuple[bool, ...] = (True, True, True)
    """Transitions between levels that double the frames."""
    sample: bool = False
    """Decode samples of the posterior instead of its means."""
    squared: float = 1.0
    """Weight of the mean squared error, pixels in [-1, 1]."""
    perceptual: float = 1.0
    """Weight of LPIPS, or of all terms of ``multiscale`` together."""
    perceptual_frames: int | None = None
    """LPIPS of so many frames of every clip, drawn anew for each update; None: of all."""
    multiscale: MultiscaleConfig = field(default_factory=MultiscaleConfig)
    """Used where no LPIPS weights are given."""
    features: float = 0.0
    """Weight of the squared error to the native decoder's features, relative to their mean square."""
    coarse_start: bool = True
    """Begin with a decoder that shows every latent's colours, frame by frame, found by least squares."""
    microbatches: int = 1
    """Passes per update; each needs 1 / microbatches of the memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of encoder and decoders; losses and LPIPS are float32 in any case."""
    ema_decay: float = 0.99
    """Of the averaged parameters, which are the result."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=2e-3, warmup_steps=30, decay_steps=1500, weight_decay=1e-5)
    )


class Student(Protocol):
    """What a decoder of any family has to offer; a ``Definition`` of a module does (docs/decoders.md)."""

    def init(self, key: jax.Array) -> Params: ...

    def __call__(self, params: Params, latent: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 3"]:
        """Latents as the encoder gives them, not normalised, to 1 + time_scale * (t - 1) frames."""
        ...


class DecoderRecipe:
    """The decoder recipe for the loop; batches are ``{"video": uint8 [B, T, H, W, 3]}``.

    ``teacher`` is the codec whose encoder is kept, ``lpips`` the parameters of ``perceptual.lpips_params``, ``student``
    a decoder of another family than TAEHV, which then brings its own initial weights.
    The state's ``frozen`` holds encoder, LPIPS and native decoder: no gradient, no moments, no average.
    """

    def __init__(
        self,
        teacher: CodecConfig,
        config: DecoderRecipeConfig,
        height: int,
        width: int,
        *,
        lpips: Params | None = None,
        student: Student | None = None,
        hooks: ShardingHooks = NO_HOOKS,
    ):
        self.teacher, self.config, self.rules, self.size = teacher, config, Rules(), (height, width)
        self.hooks = hooks
        dtype = jnp.dtype(config.dtype)
        self.tiny = None
        if student is None:
            self.tiny = student_config(teacher, config.channels, config.space_growth, config.time_growth)
        self.student = TinyStudent(self.tiny, dtype=dtype) if student is None else student
        self.encoder = definition(teacher, half="encoder", dtype=dtype)
        self.lpips = None if lpips is None else Lpips(lpips)
        self.levels: list[Level] = []
        if config.features:
            if not isinstance(teacher, NativeVAEConfig) or self.tiny is None:
                raise UserError("decoder: features are matched between a native decoder and TAEHV only; set them to 0")
            self.levels = matching_levels(teacher, self.tiny)
            self.native = definition(teacher, half="decoder", dtype=dtype)
        if self.lpips is not None:
            self.lpips.check_size(height, width)
        count = config.perceptual_frames
        if count is not None and not 1 <= count <= config.frames:
            raise UserError(
                f"decoder: perceptual_frames is {count}; expected 1 to {config.frames}, the frames of a clip"
            )
        self.optimizer = make_optimizer(config.optim, self.rules)
        self._grads = value_and_grad(self.loss, config.microbatches)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.config.batch, self.config.frames, *self.size, 3)
        return {"video": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def frozen(self, codec: Params, lpips: Params | None = None) -> Params:
        """The part of the state that never moves, from the teacher codec's parameters; ``init`` takes it."""
        parts: Params = {"codec": {name: codec[name] for name in ENCODER}}
        if self.levels:
            parts["native"] = {name: codec[name] for name in DECODER if name in codec}
        return parts | ({} if lpips is None else {"lpips": lpips})

    def init(self, key: jax.Array, frozen: Params, fit: Mapping[str, Array] | None = None) -> TrainState:
        """``fit`` is what ``coarse_start.fit_colours`` found."""
        params = self.student.init(key)
        if fit is not None:
            params = coarse_start(self.tiny, params, fit)
        if self.levels:
            keys = jax.random.split(jax.random.fold_in(key, 2), len(self.levels))
            params = params | {
                MATCH: {
                    str(index): {"kernel": uniform_fan_in(each, level.channels)}
                    for index, (each, level) in enumerate(zip(keys, self.levels, strict=True))
                }
            }
        return TrainState.create(params, self.optimizer, jax.random.fold_in(key, 1), ema=True, frozen=frozen)

    def latent_shape(self) -> tuple[int, ...]:
        """[B, T', h, w, C] of one batch."""
        teacher, (height, width) = self.teacher, self.size
        frames = 1 + (self.config.frames - 1) // teacher.time_scale
        space = teacher.space_scale
        return (self.config.batch, frames, height // space, width // space, teacher.encoder_out_channels)

    def draws(self, key: jax.Array) -> dict[str, Array]:
        """All randomness of one update: ``noise`` of latent shape, ``frames`` int32 [B, perceptual_frames]."""
        config, drawn = self.config, {}
        noise_key, frame_key = jax.random.split(key)
        if config.sample:
            drawn["noise"] = jax.random.normal(noise_key, self.latent_shape())
        if self.lpips is not None and config.perceptual_frames is not None:
            order = jnp.argsort(jax.random.uniform(frame_key, (config.batch, config.frames)), axis=1)
            drawn["frames"] = order[:, : config.perceptual_frames]
        return drawn

    def loss(self, params: Params, examples: dict[str, Array], frozen: Params) -> tuple[Array, dict[str, Array]]:
        """Mean loss over clips, and its terms; ``examples`` has ``video`` in uint8 and what ``draws`` gives."""
        config = self.config
        params, frozen = self._whole(params), self._whole(frozen)
        video = self.hooks.constrain(examples["video"].astype(jnp.float32) / 127.5 - 1, "pixels")
        code = posterior(self.encoder.bind(frozen["codec"]).encode(video))
        latent = self.hooks.constrain(code.sample(examples["noise"]) if config.sample else code.mean, "pixels")
        student = {name: part for name, part in params.items() if name != MATCH}
        if self.levels:
            activations: dict[str, Array] = {}
            made = self.student(student, latent, activations)
        else:
            made = self.student(student, latent)
        made = self.hooks.constrain(made.astype(jnp.float32), "pixels")
        terms = {"squared": jnp.square(made - video).mean((1, 2, 3, 4))}
        total = config.squared * terms["squared"]
        if self.lpips is not None:
            terms["lpips"] = self._lpips(frozen["lpips"], made, video, examples.get("frames"))
            total += config.perceptual * terms["lpips"]
        else:
            weights = config.multiscale
            others = multiscale_terms(made, video, weights.scales)
            total += config.perceptual * sum(getattr(weights, name) * term for name, term in others.items())
            terms |= others
        if self.levels:
            terms["features"] = self._features(params[MATCH], activations, frozen["native"], latent)
            total += config.features * terms["features"]
        return total.mean(), {name: term.mean() for name, term in terms.items()}

    def step(self, state: TrainState, batch: dict[str, UInt8[Array, "b t h w 3"]]) -> tuple[TrainState, dict]:
        grads, metrics = self._grads(state.params, {**batch, **self.draws(state.step_key())}, state.frozen)
        state, optim_metrics = state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
        psnr = 10 * jnp.log10(4 / metrics["squared"])
        return state, {"loss": metrics.pop("loss"), "term": metrics, "psnr": psnr, "optim": optim_metrics}

    def _whole(self, parts: Params) -> Params:
        """Kernels whole on every device: left to itself, a compiler splits convolutions by channels as their kernels
        are, and adds up every clip's features over the devices."""
        exact = {MATCH: jnp.float32, "lpips": jnp.float32}
        usual = jnp.dtype(self.config.dtype)
        return {
            name: whole_kernels({name: part}, exact.get(name, usual), self.hooks)[name] for name, part in parts.items()
        }

    def _lpips(self, params: Params, made: Array, video: Array, frames: Array | None) -> Float[Array, " b"]:
        if frames is not None:
            index = frames[:, :, None, None, None]
            made, video = (jnp.take_along_axis(x, index, axis=1) for x in (made, video))
        count, length = made.shape[:2]
        flat = (x.reshape(count * length, *x.shape[2:]) for x in (made, video))
        return self.lpips(params, *flat).reshape(count, length).mean(1)

    def _features(self, maps: Params, seen: dict[str, Array], native: Params, latent: Array) -> Float[Array, " b"]:
        """Mean over levels of the squared error to the native decoder's features, relative to their mean square."""
        wanted: dict[str, Array] = {}
        self.native.bind(native).decode(latent, activations=wanted)
        errors = []
        for index, level in enumerate(self.levels):
            target = wanted[level.native].astype(jnp.float32)
            found = seen[level.student][:, level.skip :].astype(jnp.float32) @ maps[str(index)]["kernel"]
            size = jnp.square(target).mean((1, 2, 3, 4))
            errors.append(jnp.square(found - target).mean((1, 2, 3, 4)) / (size + 1e-6))
        return sum(errors) / len(errors)


def codec_params(student: Params, codec: Params) -> Params:
    """A whole codec's parameters: the student's decoder and the teacher's encoder, the latter as it is."""
    return {name: student[name] for name in DECODER} | {name: codec[name] for name in ENCODER}
