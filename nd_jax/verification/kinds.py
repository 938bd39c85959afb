"""What a case is about, told from its config first and its name second."""

from __future__ import annotations

from collections.abc import Callable

from nd_jax.verification import clip, codecs, context_adapter, generation, mmdit, pyramid_ops, scheduler, t5, training
from nd_jax.verification.cases import Case, Outputs, Subcase

Recompute = Callable[[Case], Callable[[Subcase], Outputs]]

CLASSES = {
    "AsymmetricCausalVideoVAE": "asymmetric_vae",
    "CausalVideoVAE": "native_vae",
    "ContextAdapter": "context_adapter",
    "PyramidDiffusionMMDiT": "mmdit",
    "PyramidMMDiT": "mmdit",
}
MODEL_TYPES = {"clip_text_model": "clip_text", "t5": "t5"}
PREFIXES = {
    "clip_text": "clip_text",
    "context_adapter": "context_adapter",
    "dt5": "t5",
    "generation": "generation",
    "mmdit": "mmdit",
    "native_vae": "native_vae",
    "pyramid_ops": "pyramid_ops",
    "scheduler": "scheduler",
    "training": "training",
    "vae_": "asymmetric_vae",
}

# kind -> function of a case that loads what all its subcases share and returns the function for one subcase.
RECOMPUTE: dict[str, Recompute] = {
    "asymmetric_vae": codecs.recompute,
    "clip_text": clip.recompute,
    "context_adapter": context_adapter.recompute,
    "generation": generation.recompute,
    "mmdit": mmdit.recompute,
    "native_vae": codecs.recompute,
    "pyramid_ops": pyramid_ops.recompute,
    "scheduler": scheduler.recompute,
    "t5": t5.recompute,
    "training": training.recompute,
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
    if "vae_factors" in config:
        return "pyramid_ops"
    if config and all(isinstance(entry, dict) and "gamma" in entry for entry in config.values()):
        return "scheduler"
    names = (case.name, str(case.meta.get("case", "")))
    return next((kind for prefix, kind in PREFIXES.items() if any(name.startswith(prefix) for name in names)), None)
