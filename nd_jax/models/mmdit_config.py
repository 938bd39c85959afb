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


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and switches of the network; the defaults are the full-size student.

    ``context_embedder`` (not in the file: it follows from the class name) adds the linear layer from
    ``joint_attention_dim`` that Pyramid-Flow's teacher has; without it text arrives at inner width.
    ``sample_size`` and ``pos_embed_max_size`` only scale and size the position table, ``max_num_frames`` is carried
    along for the official loader.
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

    def __post_init__(self):
        for name in (
            *("sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
            *("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size"),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"MMDiT config: {name} is {value!r}; expected a positive integer")
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
