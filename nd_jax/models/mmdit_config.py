"""Configuration of the diffusion transformer, in the words of the official config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from nd_jax.errors import UserError
from nd_jax.models.positions import table

STUDENT, TEACHER = "PyramidMMDiT", "PyramidDiffusionMMDiT"
# Fixed in this network; a file may leave them out but not say otherwise.
FIXED = {"pos_embed_type": "sincos", "temp_pos_embed_type": "rope", "add_temp_pos_embed": True, "use_t5_mask": True}
# Pyramid-Flow's loader overrides these whatever its teacher's file says.
OVERRIDDEN = ("temp_pos_embed_type", "add_temp_pos_embed", "use_t5_mask")

NARROWED = ("kept_heads", "mlp_width", "text_mlp_width")
"""Keys of config.json that are ours; only networks with narrowed blocks have them."""


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and switches of the network; the defaults are the full-size student.

    ``context_embedder`` (not in the file: it follows from the class name) adds the linear layer from
    ``joint_attention_dim`` that Pyramid-Flow's teacher has; without it text arrives at inner width.
    ``sample_size`` and ``pos_embed_max_size`` only scale and size the position table, ``max_num_frames`` is carried
    along for the official loader.

    ``kept_heads``, ``mlp_width`` and ``text_mlp_width`` are ours, for networks with narrowed blocks: heads, and hidden
    channels of the image's and the text's MLP, in every block; None: as wide as the official network, which knows no
    other.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    max_num_frames: int = 200
    qk_norm: Literal["rms_norm", "layer_norm"] | None = "rms_norm"
    use_temporal_causal: bool = True
    interp_condition_pos: bool = True
    context_embedder: bool = False
    kept_heads: int | None = None
    mlp_width: int | None = None
    text_mlp_width: int | None = None

    def __post_init__(self):
        for name in (
            *("sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
            *("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size"),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"MMDiT config: {name} is {value!r}; expected a positive integer")
        for name, most in zip(NARROWED, (self.num_attention_heads, 4 * self.width, 4 * self.width), strict=True):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise UserError(f"MMDiT config: {name} is {value!r}; expected a number from 1 to {most}, or null")
        if self.qk_norm not in ("rms_norm", "layer_norm", None):
            raise UserError(f"MMDiT config: qk_norm is {self.qk_norm!r}; supported: 'rms_norm', 'layer_norm' or null")
        if self.attention_head_dim % 2 or self.width % 4:
            raise UserError(
                f"MMDiT config: {self.num_attention_heads} heads of {self.attention_head_dim} channels; the head must "
                "be even and the width (heads x head) a multiple of 4 for the position embeddings"
            )

    @property
    def width(self) -> int:
        """Inner width: heads times channels per head."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def heads(self) -> int:
        """Heads that a block has."""
        return self.num_attention_heads if self.kept_heads is None else self.kept_heads

    @property
    def mlp_channels(self) -> int:
        """Hidden channels of the image's MLP."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def text_mlp_channels(self) -> int:
        """Hidden channels of the text's MLP."""
        return 4 * self.width if self.text_mlp_width is None else self.text_mlp_width

    @property
    def official(self) -> bool:
        """Whether the official classes can build this network: not with blocks narrower than theirs."""
        whole = self.num_attention_heads, 4 * self.width, 4 * self.width
        return (self.heads, self.mlp_channels, self.text_mlp_channels) == whole

    @property
    def base_size(self) -> int:
        """Scale of the position table: its coordinates run from 0 to just below this."""
        return self.sample_size // self.patch_size

    def position_table(self) -> Float[np.ndarray, "1 n width"]:
        """The buffer ``pos_embed.pos_embed`` that official checkpoints store beside the parameters."""
        return table(self.width, self.pos_embed_max_size, self.base_size)

    @classmethod
    def from_dict(cls, config_json: dict[str, Any]) -> MMDiTConfig:
        """Read the content of an official config.json; keys that do not shape the network are ignored.

        Raises UserError for values this network does not implement. A teacher file (class PyramidDiffusionMMDiT) may
        state switches that its official loader overrides; the values in force are taken.
        """
        class_name = config_json.get("_class_name", STUDENT)
        if class_name not in (STUDENT, TEACHER):
            raise UserError(f"MMDiT config: _class_name is {class_name!r}; supported: {STUDENT!r}, {TEACHER!r}")
        teacher = class_name == TEACHER
        for name, value in FIXED.items():
            given = config_json.get(name, value)
            if given != value and not (teacher and name in OVERRIDDEN):
                raise UserError(f"MMDiT config: {name} is {given!r}; supported: {value!r}")
        fields = {
            name: config_json[name]
            for name in cls.__dataclass_fields__
            if name in config_json and name != "context_embedder"
        }
        if teacher:
            fields.update(use_temporal_causal=True, interp_condition_pos=True)
        config = cls(**fields, context_embedder=teacher)
        width = config_json.get("caption_projection_dim", config.width)
        if teacher and width != config.width:
            raise UserError(f"MMDiT config: caption_projection_dim is {width!r}; supported: the width {config.width}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of the official config.json."""
        fields = asdict(self)
        teacher = fields.pop("context_embedder")
        fields = {name: value for name, value in fields.items() if name not in NARROWED or value is not None}
        return dict(
            sorted(
                {
                    "_class_name": TEACHER if teacher else STUDENT,
                    "_diffusers_version": "0.34.0",
                    **fields,
                    **FIXED,
                    "caption_projection_dim": self.width,
                    "use_gradient_checkpointing": False,
                    "gradient_checkpointing_ratio": 0.6,
                    **({"use_flash_attn": False} if teacher else {}),
                }.items()
            )
        )
