"""How close is close enough: the tolerances of golden/README.md as a table.

Absolute unless said otherwise. Where the README gives a column of several, the rules go by output name. An output
that no rule covers is not compared, and reported as such.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest absolute difference allowed; 0 means exactly equal."""

    absolute: float

    def __str__(self) -> str:
        return "exact" if self.absolute == 0 else f"{self.absolute:.0e}"


EXACT = 0.0

# kind of case -> (pattern of OUTPUT, the name without its subcase, or of SUBCASE:OUTPUT; tolerance). First match wins.
TABLE: dict[str, tuple[tuple[str, float], ...]] = {
    "clip_text": (
        (r"pooled_position", EXACT),
        (r"last_hidden_state|penultimate_hidden_state|pooled_output|text_embeds|hidden_states/\d+", 2e-5),
    ),
    "context_adapter": ((r"y", 1e-5),),
    "t5": ((r"bucket", EXACT), (r"encoder_last_hidden_state|prompt_embeds", 5e-5)),
    "generation": (
        (r"(pos|neg)/prompt_embeds", 5e-5),  # recorded as inputs; the text encoder has to reproduce them
        (r"prompt_embeds_adapted_(pos|neg)", 1e-5),
        (r"latents|trace/\d+/(velocity_after_guidance|sample_before)", 5e-4),
        (r"trace/\d+/timestep", 1e-3),
        (r"trace/\d+/(sigma|sigma_next)", 1e-6),
        (r"frames_uint8", 1.0),
    ),
    "mmdit": (
        (r"pred/\d+|blocks/\d+/(image|text)|context_embedder_out", 1e-4),
        (r"loss|loss_per_sample|grad/.+|grad_norm/.+", 1e-5),
        # pieces
        (r"attention_mask/\d+|rope_ids/\d+", EXACT),
        (r"table|raw_float64|pos|values|rope|rope/\d+|module", 1e-6),
        (r"sinusoid|temb", 2e-4),
        (r"q|k|x|y|tokens/\d+|gate_msa|shift_mlp|scale_mlp|gate_mlp", 1e-5),
    ),
    "native_vae": ((r"moments|video|video_rows_\d+_\d+|frame_means|act/\w+|latent_mean", 5e-5),),
    "asymmetric_vae": (
        (r"moments|mean|logvar|std|latent|scaled_latent|act/\w+", 2e-4),
        (r"video|post_quant|block/\d+", 1e-4),
    ),
    "pyramid_ops": (
        (r"uint8", EXACT),
        (r"pyramid/\d+|y|covariance|eigenvalues|past/\d+/\d+|vae_input|video_bt_hwc|latents_after_call|images", 1e-5),
    ),
    "scheduler": (
        (r"(.*/)?(timesteps|sigmas)_through_bf16|.*bf16.*:prev_sample", EXACT),
        (r"(.*/)?timesteps(_first_last|_per_stage)?|timestep_per_stage_range", 1e-3),
        (
            r"(.*/)?(sigmas|sigmas_first_last|sigmas_per_stage|start_sigmas|end_sigmas|orig_start_sigmas|timestep_ratios)",
            1e-6,
        ),
        (r"prev_sample", 1e-6),
    ),
    "training": (
        (r"col\d+/index|stage_length_table:.+", EXACT),
        (r"noisy/\d+/\d+|targets/\d+|ratios/\d+|y", 1e-6),
        (r"pred/\d+", 1e-4),
        (r"loss", 1e-5),
        (r"timesteps/\d+|timesteps_flat", 1e-4),
    ),
}


def tolerance(kind: str, subcase: str, output: str) -> Tolerance | None:
    """Tolerance of an output (its name without the subcase) of a kind of case; ``None`` if there is no rule."""
    for pattern, absolute in TABLE.get(kind, ()):
        if re.fullmatch(pattern, output) or re.fullmatch(pattern, f"{subcase}:{output}"):
            return Tolerance(absolute)
    return None
