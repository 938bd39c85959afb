"""The networks that the converters know: official class names, config, structure and table of names of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nd_jax.checked_files import shown
from nd_jax.converters import (
    names_clip,
    names_context_adapter,
    names_image_vae,
    names_mmdit,
    names_quicksrnet,
    names_safety_checker,
    names_t5,
    names_unet,
    names_video_vae,
)
from nd_jax.converters.tables import Table, native_table
from nd_jax.errors import UserError
from nd_jax.models import causal_vae, clip, context_adapter, image_vae, mmdit, quicksrnet, safety_checker, t5, unet

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # file names without ending
_MOST_LAYERS = 1000  # a config is somebody else's: no loop over its numbers before they are bounded
WRONG_VALUE = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)  # what odd config values raise


@dataclass(frozen=True)
class Kind:
    """What the converters need to know of a network. ``classes`` are the official class names, ``stem`` its file."""

    name: str
    classes: tuple[str, ...]
    stem: str
    config_types: tuple[type, ...]
    read_config: Callable[[dict[str, Any], set[str]], Any]
    definition: Callable[[Any], Any]
    names: Any  # module with rules(config) and extras(config)

    def table(self, config: Any) -> Table:
        """Names, shapes and layouts of this network."""
        return Table(self.names.rules(config), _abstract(self, config), self.names.extras(config))

    def native_table(self, config: Any) -> Table:
        """The same for nd-jax's own files."""
        return native_table(_abstract(self, config))


@functools.lru_cache(maxsize=32)
def _abstract(kind: Kind, config: Any) -> dict[str, Any]:
    """Shapes of a network's parameters; tracing a large one takes a second. Read only."""
    return kind.definition(config).abstract()


def _ignoring_names(read: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], set[str]], Any]:
    return lambda config, names: read(config)


def _mmdit_config(config: dict[str, Any], names: set[str]) -> mmdit.MMDiTConfig:
    if "_class_name" not in config:
        teacher = "context_embedder.weight" in names or "context_embedder/kernel" in names
        config = config | {"_class_name": "PyramidDiffusionMMDiT" if teacher else "PyramidMMDiT"}
    return mmdit.MMDiTConfig.from_dict(config)


def _t5_config(config: dict[str, Any], names: set[str]) -> t5.T5Config:
    with_projection = "T5EncoderWithProjection" in (config.get("architectures") or [])
    with_projection |= any(name.startswith("final_projection") for name in names)
    return t5.T5Config.from_dict(config, projection=with_projection or None)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "mmdit",
            ("PyramidMMDiT", "PyramidDiffusionMMDiT"),
            DIFFUSERS,
            (mmdit.MMDiTConfig,),
            _mmdit_config,
            mmdit.definition,
            names_mmdit,
        ),
        Kind(
            "t5",
            ("T5EncoderWithProjection", "T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
            TRANSFORMERS,
            (t5.T5Config,),
            _t5_config,
            t5.definition,
            names_t5,
        ),
        Kind(
            "clip",
            ("CLIPTextModelWithProjection", "CLIPTextModel"),
            TRANSFORMERS,
            (clip.CLIPTextConfig,),
            _ignoring_names(clip.CLIPTextConfig.from_dict),
            clip.definition,
            names_clip,
        ),
        Kind(
            "context_adapter",
            ("ContextAdapter",),
            DIFFUSERS,
            (context_adapter.ContextAdapterConfig,),
            _ignoring_names(context_adapter.ContextAdapterConfig.from_dict),
            context_adapter.definition,
            names_context_adapter,
        ),
        Kind(
            "video_vae",
            ("AsymmetricCausalVideoVAE", "CausalVideoVAE"),
            DIFFUSERS,
            (causal_vae.AsymmetricVAEConfig, causal_vae.NativeVAEConfig),
            _ignoring_names(causal_vae.config_from_dict),
            causal_vae.definition,
            names_video_vae,
        ),
        Kind(
            "unet",
            ("UNet2DConditionModel",),
            DIFFUSERS,
            (unet.UNetConfig,),
            _ignoring_names(unet.UNetConfig.from_dict),
            unet.definition,
            names_unet,
        ),
        Kind(
            "image_vae",
            ("AutoencoderKL",),
            DIFFUSERS,
            (image_vae.ImageVAEConfig,),
            _ignoring_names(image_vae.ImageVAEConfig.from_dict),
            image_vae.definition,
            names_image_vae,
        ),
        Kind(
            "quicksrnet",
            ("QuickSRNet",),
            DIFFUSERS,
            (quicksrnet.QuickSRNetConfig,),
            _ignoring_names(quicksrnet.QuickSRNetConfig.from_dict),
            quicksrnet.definition,
            names_quicksrnet,
        ),
        Kind(
            "safety_checker",
            ("StableDiffusionSafetyChecker",),
            TRANSFORMERS,
            (safety_checker.SafetyCheckerConfig,),
            _ignoring_names(safety_checker.SafetyCheckerConfig.from_dict),
            safety_checker.definition,
            names_safety_checker,
        ),
    )
}
_BY_MODEL_TYPE = {"t5": "t5", "clip_text_model": "clip"}


def get_kind(name: str) -> Kind:
    """The kind called ``name``.

    Raises:
        UserError: if there is none.
    """
    if name not in KINDS:
        raise UserError(f"component kind {shown(name)} does not exist; expected one of {', '.join(KINDS)}")
    return KINDS[name]


def detect_kind(config: Mapping[str, Any], where: str) -> Kind:
    """The kind that a config.json speaks of, by ``_class_name``, ``architectures`` or ``model_type``.

    Raises:
        UserError: naming what it says and what is known.
    """
    said = config.get("_class_name") or config.get("architectures") or config.get("model_type")
    for name in said if isinstance(said, list) else [said]:
        for kind in KINDS.values():
            if name in kind.classes or _BY_MODEL_TYPE.get(name if isinstance(name, str) else "") == kind.name:
                return kind
    known = sorted(name for kind in KINDS.values() for name in kind.classes)
    raise UserError(f"{where} is for {shown(said)}; expected one of {', '.join(known)}")


def read_config(kind: Kind, content: dict[str, Any], where: str, names: set[str] = frozenset()) -> Any:
    """The config dataclass of a config.json's content; ``names`` are the tensors found beside it, if any.

    Raises:
        UserError: for values that are not supported or of the wrong kind.
    """
    for key, value in content.items():
        depths = value if isinstance(value, list) else [value]
        if "layers" in key and any(isinstance(depth, int) and depth > _MOST_LAYERS for depth in depths):
            raise UserError(f"{where}: {shown(key)} is {shown(value)}; expected at most {_MOST_LAYERS} layers")
    try:
        return kind.read_config(content, names)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except WRONG_VALUE as error:
        raise UserError(
            f"{where} has a value of the wrong kind ({error}); compare it with an official config"
        ) from None


def kind_of(config: Any) -> Kind:
    """The kind that a config dataclass belongs to.

    Raises:
        UserError: if it is none of ours.
    """
    for kind in KINDS.values():
        if isinstance(config, kind.config_types):
            return kind
    raise UserError(f"{type(config).__name__} is not the config of a network that the converters know")


def abstract_tensors(kind: str, config: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every tensor of an official checkpoint, without any data: name -> (shape, "float32")."""
    return {name: (shape, "float32") for name, shape in get_kind(kind).table(config).shapes().items()}
