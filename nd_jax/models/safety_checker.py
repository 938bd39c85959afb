"""The safety checker of Stable Diffusion: a CLIP vision tower whose picture embeddings are compared with 17 concepts.

Pictures [B, H, W, 3] in [0, 1]; ``prepare`` brings any size to what the tower reads. Three further "special care"
embeddings lower every concept's threshold by 0.01 when one of them is near.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nd_jax.errors import UserError
from nd_jax.models.activations import check_activation
from nd_jax.models.clip import CLIPLayer
from nd_jax.models.functional import Definition
from nd_jax.models.stacked import scan_stack, stack

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, by colour."""
MARGIN = 0.0005
"""The reference rounds scores to three decimals before it asks whether they are positive."""
LENIENCE = 0.01


@dataclasses.dataclass(frozen=True)
class SafetyCheckerConfig:
    """Shape of the tower, under the names of transformers' ``vision_config``; CLIP ViT-L/14 by default."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    concepts: int = 17
    special: int = 3

    class_name: ClassVar[str] = "StableDiffusionSafetyChecker"

    def __post_init__(self):
        check_activation("hidden_act", self.hidden_act)
        for key, value, unit in (
            ("hidden_size", self.hidden_size, self.num_attention_heads),
            ("image_size", self.image_size, self.patch_size),
        ):
            if value < unit or value % unit:
                raise UserError(f"config key {key!r} is {value}; expected a multiple of {unit}")
        for key, most in (("num_hidden_layers", 1000), ("concepts", 10_000), ("special", 10_000)):
            if not 1 <= getattr(self, key) <= most:
                raise UserError(f"config key {key!r} is {getattr(self, key)}; expected 1 to {most}")

    @property
    def positions(self) -> int:
        """Patches and the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SafetyCheckerConfig:
        """Read the official config.json. Keys that it lacks have transformers' defaults for CLIP vision towers."""
        vision = config.get("vision_config") or {}
        plain = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
        values = {key: vision.get(key, default) for key, default in plain.items()}
        values |= {key: config[key] for key in ("concepts", "special") if key in config}  # ours, for other numbers
        return cls(projection_dim=config.get("projection_dim", 512), **values)

    def to_dict(self) -> dict[str, Any]:
        """Content of the official config.json."""
        values = dataclasses.asdict(self)
        counts = {key: values.pop(key) for key in ("concepts", "special")}
        if counts == {"concepts": 17, "special": 3}:
            counts = {}
        projection = values.pop("projection_dim")
        vision = {**values, "projection_dim": projection, "model_type": "clip_vision_model"}
        return {
            "architectures": [self.class_name],
            "model_type": "clip",
            "projection_dim": projection,
            "vision_config": vision,
            **counts,
        }


class Verdict(NamedTuple):
    """Per picture: whether any concept was met, and by how much each concept's threshold was passed (positive: met)."""

    unsafe: Bool[Array, " b"]
    scores: Float[Array, "b concepts"]


class VisionEmbeddings(nnx.Module):
    """Patches through a convolution without bias, a class token in front, learned positions."""

    def __init__(self, config: SafetyCheckerConfig, dtype: Any, rngs: nnx.Rngs):
        patch, width = config.patch_size, config.hidden_size
        init = jax.nn.initializers.normal(0.02)
        self.class_embedding = nnx.Param(init(rngs.params(), (width,)))
        self.patch_embedding = nnx.Conv(
            3,
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            kernel_init=init,
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Embed(config.positions, width, embedding_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
        patches = self.patch_embedding(image)
        patches = patches.reshape(len(image), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (len(image), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class SafetyChecker(nnx.Module):
    """``checker(image)``: prepared pictures [B, S, S, 3] to a ``Verdict``."""

    def __init__(self, config: SafetyCheckerConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        norm = {"epsilon": config.layer_norm_eps, "use_fast_variance": False, "dtype": jnp.float32, "rngs": rngs}
        self.embeddings = VisionEmbeddings(config, dtype, rngs)
        self.pre_layrnorm = nnx.LayerNorm(config.hidden_size, **norm)
        self.layers = stack(lambda keys: CLIPLayer(config, dtype, keys), config.num_hidden_layers, rngs)
        self.post_layernorm = nnx.LayerNorm(config.hidden_size, **norm)
        self.visual_projection = nnx.Linear(
            config.hidden_size, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
        )
        shapes = {"concept": config.concepts, "special_care": config.special}
        for name, count in shapes.items():
            setattr(self, f"{name}_embeds", nnx.Param(jnp.ones((count, config.projection_dim))))
            setattr(self, f"{name}_embeds_weights", nnx.Param(jnp.ones((count,))))

    def embed(self, image: Float[Array, "b s s 3"]) -> Float[Array, "b p"]:
        """Projected picture embeddings."""
        x = self.pre_layrnorm(self.embeddings(image.astype(self.dtype))).astype(self.dtype)
        x, _ = scan_stack(self.layers, lambda layer, y: (layer(y, jnp.ones((1, 1, 1, 1), bool)), None), x)
        return self.visual_projection(self.post_layernorm(x[:, 0]).astype(self.dtype)).astype(jnp.float32)

    def __call__(self, image: Float[Array, "b s s 3"]) -> Verdict:
        found = self.embed(image)
        near = _cosine(found, self.special_care_embeds[...]) - self.special_care_embeds_weights[...]
        careful = (near > MARGIN).any(-1, keepdims=True)
        scores = _cosine(found, self.concept_embeds[...]) - self.concept_embeds_weights[...] + LENIENCE * careful
        return Verdict((scores > MARGIN).any(-1), scores)


def _cosine(a: Float[Array, "b p"], b: Float[Array, "n p"]) -> Float[Array, "b n"]:
    a, b = (x.astype(jnp.float32) for x in (a, b))
    a, b = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
    return jnp.einsum("bp,np->bn", a, b, precision="highest")


def prepare(image: Float[Array, "b h w 3"], size: int) -> Float[Array, "b size size 3"]:
    """Pictures in [0, 1] as the tower reads them: shorter side to ``size`` (bicubic, antialiased), the middle cut out,
    CLIP's mean and deviation."""
    b, h, w, c = image.shape
    factor = size / min(h, w)
    tall, wide = max(size, int(h * factor)), max(size, int(w * factor))
    image = jnp.clip(jax.image.resize(image.astype(jnp.float32), (b, tall, wide, c), "cubic", antialias=True), 0, 1)
    top, left = (tall - size) // 2, (wide - size) // 2
    return (image[:, top : top + size, left : left + size] - jnp.asarray(MEAN)) / jnp.asarray(STD)


def definition(config: SafetyCheckerConfig, *, dtype: Any = jnp.float32) -> Definition:
    """Structure of a checker that computes in ``dtype``; norms, softmax and the comparison in float32."""
    return Definition(lambda rngs: SafetyChecker(config, dtype=dtype, rngs=rngs))
