"""What a case is about, told from its config first and its name second."""

from __future__ import annotations

from collections.abc import Callable

from nd_jax.verification import (
    clip,
    codecs,
    context_adapter,
    generation,
    image_vae,
    lcm,
    mmdit,
    pyramid_ops,
    quicksrnet,
    scheduler,
    t5,
    training,
    unet,
)
from nd_jax.verification.cases import Case, Outputs, Subcase

Recompute = Callable[[Case], Callable[[Subcase], Outputs]]

CLASSES = {
    "AsymmetricCausalVideoVAE": "asymmetric_vae",
    "AutoencoderKL": "image_vae",
    "CausalVideoVAE": "native_vae",
    "ContextAdapter": "context_adapter",
    "LCMScheduler": "lcm_scheduler",
    "PyramidDiffusionMMDiT": "mmdit",
    "PyramidMMDiT": "mmdit",
    "QuickSRNet": "quicksrnet",
    "UNet2DConditionModel": "unet",
}
MODEL_TYPES = {"clip_text_model": "clip_text", "t5": "t5"}
PREFIXES = {
    "clip_text": "clip_text",
    "context_adapter": "context_adapter",
    "dt5": "t5",
    "generation": "generation",
    "image_vae": "image_vae",
    "lcm_scheduler": "lcm_scheduler",
    "mmdit": "mmdit",
    "native_vae": "native_vae",
    "pyramid_ops": "pyramid_ops",
    "quicksrnet_": "quicksrnet",
    "scheduler": "scheduler",
    "sdxl_unet": "unet",
    "training": "training",
    "vae_": "asymmetric_vae",
}

# kind -> function of a case that loads what all its subcases share and returns the function for one subcase.
RECOMPUTE: dict[str, Recompute] = {
    "asymmetric_vae": codecs.recompute,
    "clip_text": clip.recompute,
    "context_adapter": context_adapter.recompute,
    "generation": generation.recompute,
    "image_vae": image_vae.recompute,
    "lcm_scheduler": lcm.recompute,
    "mmdit": mmdit.recompute,
    "native_vae": codecs.recompute,
    "pyramid_ops": pyramid_ops.recompute,
    "quicksrnet": quicksrnet.recompute,
    "scheduler": scheduler.recompute,
    "t5": t5.recompute,
    "training": training.recompute,
    "unet": unet.recompute,
}


def kind_of(case: Case) -> str | None:
    """A key of ``RECOMPUTE``, or ``None`` if there is no network for this case."""
    config = case.config
    if "_class_name" in config:
        return CLASSES.get(config["_class_name"])
    if "model_type" in config:
        return MODEL_TYPES.get(config["model_type"])
    if case.file("checkpoint").is_dir():
        return "generation"
    if "dit" in config and "corrupt_ratio" in config:
        return "training"
    if "num_intermediate_layers" in config:
        return "quicksrnet"
    if "vae_factors" in config:
        return "pyramid_ops"
    if config and all(isinstance(entry, dict) and "gamma" in entry for entry in config.values()):
        return "scheduler"
    names = (case.name, str(case.meta.get("case", "")))
    return next((kind for prefix, kind in PREFIXES.items() if any(name.startswith(prefix) for name in names)), None)
