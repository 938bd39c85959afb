"""How close is close enough.

float32: the absolute tolerances recommended with the recordings, about ten times the reference's own rounding. Where
there are several for one kind of case, the rules go by output name. An output that no rule covers is not compared, and
reported as such.

bfloat16 (networks only; parameters, norms, softmax, rotary and timestep embeddings stay float32): the root mean square
of the difference divided by that of the expected array. Largest values measured on the public cases, on a CPU:
text encoder 0.015, ContextAdapter 0.004, CLIP 0.018, denoiser 0.008, video codecs 0.024, image VAE 0.020, UNet 0.019,
QuickSRNet 0.006 (one bf16 rounding is 0.002).
The limits are two to three times that, since other seeds and depths vary.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest difference allowed: absolute, or relative in the root mean square; 0 means exactly equal."""

    limit: float
    relative: bool = False

    def __str__(self) -> str:
        return "exact" if self.limit == 0 else f"{self.limit:g}{' of rms' if self.relative else ''}"


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
    "image_vae": (
        (r"image_uint8", 1.0),
        (r"moments|mean|std|image|image_0_1|latent_for_act|act/\w+", 2e-5),
    ),
    "lcm_scheduler": (
        (r"timesteps|from_\d+_of_\d+", EXACT),
        (r"c_skip", 1e-5),
        (r"betas|alphas_cumprod|alphas_cumprod_at_timesteps|final_alpha_cumprod|init_noise_sigma|c_out", 1e-6),
        (r"step/\d+/(sample|predicted_original|denoised|prev_sample)|noisy", 1e-4),
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
    "quicksrnet": ((r"image", 2e-5),),
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
    "unet": (
        (r"time_sinusoid|time_ids_sinusoid", 5e-5),
        (r"timestep_cond", 5e-4),
        (r"noise_pred|step/\d+/noise_pred|hidden_states", 2e-5),
        (r"act/\w+", 1e-4),
        (r"latent|step/\d+/(denoised|prev_sample)", 3e-4),
    ),
}
RELATIVE = {("lcm_scheduler", "c_skip")}
"""Outputs so small that only the relative difference says anything, in float32 as well."""


BFLOAT16: dict[str, tuple[tuple[str, float], ...]] = {
    "asymmetric_vae": ((r"moments|mean|logvar|std|latent|scaled_latent|act/\w+|video|post_quant|block/\d+", 0.06),),
    "clip_text": (
        (r"pooled_position", EXACT),
        (r"last_hidden_state|penultimate_hidden_state|pooled_output|text_embeds|hidden_states/\d+", 0.04),
    ),
    "context_adapter": ((r"y", 0.012),),
    "image_vae": ((r"moments|mean|image|act/\w+", 0.06),),
    "mmdit": ((r"pred/\d+|blocks/\d+/(image|text)|context_embedder_out", 0.02),),
    "native_vae": ((r"moments|video|video_rows_\d+_\d+|frame_means|act/\w+|latent_mean", 0.06),),
    "quicksrnet": ((r"image", 0.018),),
    "t5": ((r"encoder_last_hidden_state|prompt_embeds", 0.04),),
    "unet": ((r"noise_pred|hidden_states|act/\w+", 0.05),),
}


def tolerance(kind: str, subcase: str, output: str, *, bfloat16: bool = False) -> Tolerance | None:
    """Tolerance of an output (its name without the subcase) of a kind of case; ``None`` if there is no rule."""
    for pattern, limit in (BFLOAT16 if bfloat16 else TABLE).get(kind, ()):
        if re.fullmatch(pattern, output) or re.fullmatch(pattern, f"{subcase}:{output}"):
            return Tolerance(limit, relative=bfloat16 or (kind, output) in RELATIVE)
    return None
