"""The programs of a preset for a mesh of any devices: every run's real step, and what sampling calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.errors import UserError
from nd_jax.models import causal_vae, context_adapter, mmdit, t5
from nd_jax.models.causal_vae import NativeVAEConfig
from nd_jax.models.functional import Params
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import ADAPTER, CODEC, DENOISER, T5, TEXT_PARTS, Conditions, SystemConfig, TextTokens
from nd_jax.models.t5 import T5Config, t5_xxl
from nd_jax.pyramid.layout import envelopes, layout_arrays
from nd_jax.pyramid.sampler import guide, twice
from nd_jax.recipes.adversarial import AdversarialRecipe
from nd_jax.recipes.decoder_distillation import DecoderRecipe
from nd_jax.recipes.dmd import DmdRecipe
from nd_jax.recipes.few_step import FewStepRecipe
from nd_jax.recipes.flow_matching import FlowRecipe
from nd_jax.recipes.mean_flow import MeanFlowRecipe
from nd_jax.recipes.preset import (
    AdversarialRun,
    DecoderRun,
    DmdRun,
    FlowRun,
    MeanFlowRun,
    Preset,
    ProgressiveRun,
    RecoveryRun,
    StepRun,
    TextDistillRun,
    UpscalerRun,
)
from nd_jax.recipes.progressive import ProgressiveRecipe
from nd_jax.recipes.recovery import RecoveryRecipe
from nd_jax.recipes.text_distillation import TextDistillRecipe
from nd_jax.recipes.text_teacher import EMBEDDER
from nd_jax.recipes.upscaler import UpscalerRecipe
from nd_jax.system import latent_stats
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.mesh import batch_entry
from nd_jax.training.program import Program
from nd_jax.training.sharding import Rules, param_shardings

REMOVED = 6
"""Blocks that a preset's pruned student lacks, where nobody says otherwise (the paper's number)."""

Abstract = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Systems:
    """The networks of a preset's runs: the many-step system, and the one that was pruned."""

    whole: SystemConfig
    pruned: SystemConfig
    kept: tuple[int, ...]

    @classmethod
    def of(cls, preset: Preset, removed: int = REMOVED) -> Systems:
        """Raises UserError when fewer blocks can go."""
        network = preset.system.diffusion_transformer
        if not 0 <= removed < network.num_layers:
            raise UserError(f"plan: {removed} blocks removed of {network.num_layers}; expected fewer")
        kept = (*range(network.num_layers - 1 - removed), network.num_layers - 1)
        smaller = dataclasses.replace(network, num_layers=len(kept))
        return cls(preset.system, dataclasses.replace(preset.system, diffusion_transformer=smaller), kept)


def plannable(preset: Preset) -> list[str]:
    """Names of the runs that ``recipe_program`` knows to build."""
    return [name for name, run in preset.runs.items() if isinstance(run, tuple(_MAKERS))]


def recipe_program(
    preset: Preset, name: str, mesh: Mesh, *, batch: int | None = None, removed: int = REMOVED
) -> Program:
    """One run's step on ``mesh``, nothing allocated; ``batch`` instead of the preset's.

    Raises UserError for a run of a kind that is not planned, and for sizes that do not fit each other.
    """
    run, systems = preset.run(name), Systems.of(preset, removed)
    recipe = run.recipe if batch is None else dataclasses.replace(run.recipe, batch=batch)
    for kind, make in _MAKERS.items():
        if isinstance(run, kind):
            made, given = make(preset, systems, run, recipe, mesh)
            return Program(made, mesh, jax.random.key(0), given)
    raise UserError(
        f"plan: run {name!r} of {preset.name} is not planned; expected one of {', '.join(plannable(preset))}"
    )


def _flow(preset: Preset, systems: Systems, run: Any, config: Any, mesh: Mesh) -> tuple[Any, tuple]:
    made = FlowRecipe(systems.whole, config, **_options(preset, mesh))
    return made, (_abstract(made, TEXT_PARTS, DENOISER),)


def _recovery(preset: Preset, systems: Systems, run: Any, config: Any, mesh: Mesh) -> tuple[Any, tuple]:
    made = RecoveryRecipe(systems.pruned, config, kept=systems.kept, **_options(preset, mesh))
    return made, (_abstract(made, TEXT_PARTS, DENOISER), _denoiser(systems.whole))


def _steps(preset: Preset, systems: Systems, run: StepRun, config: Any, mesh: Mesh) -> tuple[Any, tuple]:
    text, clip = preset.video.text_length, preset.video.clip_length
    negative = TextTokens(*(np.zeros((1, n), np.int32) for n in (text, text, clip, clip)))
    if config.text == "stored":
        network = preset.system.diffusion_transformer
        width = network.joint_attention_dim if network.context_embedder else network.width
        states, pooled = (
            np.zeros((1, text, width), np.float32),
            np.zeros((1, network.pooled_projection_dim), np.float32),
        )
        negative = Conditions(states, negative.t5_mask, pooled)
    # Over several rounds the student becomes a teacher, and is as deep as the first one.
    own = systems.whole if getattr(config, "rounds", 1) > 1 else systems.pruned
    made = STEP_RECIPES[type(run)](own, config, negative=negative, **_options(preset, mesh))
    return made, (_abstract(made, TEXT_PARTS, DENOISER), _denoiser(systems.whole))


def text_teacher(preset: Preset) -> SystemConfig:
    """The system whose text encoder a preset distils: T5-XXL with the denoiser's own embedding at full size."""
    network = preset.system.diffusion_transformer
    if network.joint_attention_dim != t5_xxl().d_model:
        return preset.system
    teacher = dataclasses.replace(network, context_embedder=True)
    return dataclasses.replace(
        preset.system, text_encoder_3=t5_xxl(), context_adapter=None, diffusion_transformer=teacher
    )


def _text(preset: Preset, systems: Systems, run: TextDistillRun, config: Any, mesh: Mesh) -> tuple[Any, tuple]:
    teacher = text_teacher(preset)
    network = teacher.diffusion_transformer
    made = TextDistillRecipe(
        run.encoder,
        run.adapter,
        config,
        denoiser=network,
        teacher=teacher,
        text_length=preset.video.text_length,
        hooks=sharding_hooks(mesh),
    )
    parts: Params = {T5: t5.definition(teacher.text_encoder_3).abstract()}
    if teacher.context_adapter is not None:
        parts[ADAPTER] = context_adapter.definition(teacher.context_adapter).abstract()
    if network.context_embedder:
        shapes = {"kernel": (network.joint_attention_dim, network.width), "bias": (network.width,)}
        parts[EMBEDDER] = {key: Abstract(shape, jnp.float32) for key, shape in shapes.items()}
    return made, (parts, {T5: made.encoder.abstract()})


def _decoder(preset: Preset, systems: Systems, run: DecoderRun, config: Any, mesh: Mesh) -> tuple[Any, tuple]:
    teacher, video = NativeVAEConfig(), preset.video
    lpips = vgg16() if min(video.height, video.width) >= 64 else None
    made = DecoderRecipe(teacher, config, video.height, video.width, lpips=lpips, hooks=sharding_hooks(mesh))
    return made, (made.frozen(causal_vae.definition(teacher).abstract(), lpips),)


def _upscaler(preset: Preset, systems: Systems, run: UpscalerRun, config: Any, mesh: Mesh) -> tuple[Any, tuple]:
    return UpscalerRecipe(run.network, config, sharding_hooks(mesh)), ()


def vgg16() -> Params:
    """Shapes of LPIPS's weights with VGG16, the network that the paper's loss is taken to mean."""
    places = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    convs, lins, before = {}, {}, 3
    for index, (width, slice_) in enumerate(zip((64, 128, 256, 512, 512), places, strict=True)):
        for place in slice_:
            kernel = Abstract((3, 3, before, width), jnp.float32)
            convs[str(place)] = {"kernel": kernel, "bias": Abstract((width,), jnp.float32)}
            before = width
        lins[str(index)] = {"scale": Abstract((width,), jnp.float32)}
    colours = {name: {"scale": Abstract((3,), jnp.float32)} for name in ("shift", "scale")}
    return {"conv": convs, "lin": lins, "colours": colours}


STEP_RECIPES: Mapping[type, type[FewStepRecipe]] = {
    DmdRun: DmdRecipe,
    ProgressiveRun: ProgressiveRecipe,
    MeanFlowRun: MeanFlowRecipe,
    AdversarialRun: AdversarialRecipe,
}
_MAKERS: Mapping[type, Callable] = {
    RecoveryRun: _recovery,
    FlowRun: _flow,
    TextDistillRun: _text,
    DecoderRun: _decoder,
    UpscalerRun: _upscaler,
    **dict.fromkeys(STEP_RECIPES, _steps),
}


def _options(preset: Preset, mesh: Mesh) -> dict[str, Any]:
    return {
        "schedule": preset.schedule,
        "stats": latent_stats(preset.system.causal_video_vae),
        "sizes": [preset.latent_size],
        "text_length": preset.video.text_length,
        "clip_length": preset.video.clip_length,
        "hooks": sharding_hooks(mesh),
    }


def _abstract(made: Any, *parts: Any) -> Params:
    names = {name for part in parts for name in ([part] if isinstance(part, str) else part)}
    return {name: made.definitions[name].abstract() for name in made.definitions if name in names}


def _denoiser(system: SystemConfig) -> Params:
    return mmdit.definition(system.diffusion_transformer).abstract()


# ---- sampling


@dataclass(frozen=True)
class Call:
    """A program of sampling and how often one video calls it."""

    name: str
    function: Callable
    arguments: tuple
    times: float


def sampling_calls(preset: Preset, network: MMDiTConfig, mesh: Mesh, prompts: int) -> list[Call]:
    """What generating ``prompts`` videos at once runs on ``mesh``, in bfloat16: the denoiser of every stage, guided as
    the preset's plan says, and the decoder, one latent frame at a time."""
    video, plan, units = preset.video, preset.sampling, preset.latent_size[0]
    denoiser = mmdit.definition(network, dtype=jnp.bfloat16, hooks=sharding_hooks(mesh))
    rules = Rules()
    split = NamedSharding(mesh, P(batch_entry(mesh)))

    def on_mesh(params: Params) -> Params:
        low = jax.tree.map(lambda x: Abstract(x.shape, jnp.bfloat16), params)
        where = param_shardings(low, rules, mesh)
        return jax.tree.map(lambda x, s: Abstract(x.shape, x.dtype, sharding=s), low, where)

    def array(*shape: int, dtype: Any = jnp.float32) -> Abstract:
        return Abstract(shape, dtype, sharding=split)

    params, calls = on_mesh(denoiser.abstract()), []
    for stage, envelope in enumerate(envelopes_of(preset, units)):
        guided = any(w not in (0.0, 1.0) for w in (plan.first_guidance, plan.later_guidance))
        rows = prompts * (2 if guided else 1)

        def denoise(params, text, mask, pooled, z, timestep, history, unit, scale, envelope=envelope, guided=guided):
            if guided:
                z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
            layout = layout_arrays(envelope, unit, mask)
            found = denoiser(params, [(*history, z)], text, pooled, timestep, [layout])
            return guide(found[0], scale) if guided else found[0]

        clips = [array(prompts, *clip, network.in_channels) for clip in envelope.clips]
        width = network.joint_attention_dim if network.context_embedder else network.width
        arguments = (
            params,
            array(rows, video.text_length, width),
            array(rows, video.text_length, dtype=jnp.int32),
            array(rows, network.pooled_projection_dim),
            clips[-1],
            array(prompts),
            tuple(clips[:-1]),
            Abstract((), jnp.int32),
            Abstract((), jnp.float32),
        )
        times = plan.first_steps[stage] + (units - 1) * plan.later_steps[stage]
        calls.append(Call(f"stage {stage}", denoise, arguments, times))
    calls.append(_decode(preset, on_mesh, array, prompts, units))
    return calls


def envelopes_of(preset: Preset, units: int) -> tuple:
    """Of every stage, for videos of so many latent frames."""
    patch = preset.system.diffusion_transformer.patch_size
    _, height, width = preset.latent_size
    return envelopes(
        units - 1, preset.video.text_length, height, width, patch_size=patch, stages=preset.schedule.stages
    )


def _decode(preset: Preset, on_mesh: Callable, array: Callable, prompts: int, units: int) -> Call:
    codec = causal_vae.definition(preset.system.causal_video_vae, dtype=jnp.bfloat16)
    _, height, width = preset.latent_size
    latent = array(prompts, 1, height, width, preset.system.diffusion_transformer.in_channels)
    params = on_mesh(codec.abstract())
    _, past = jax.eval_shape(lambda p, z: codec.bind(p).decode_chunk(z), params, latent)
    past = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), past)
    return Call("decode", lambda p, z, past: codec.bind(p).decode_chunk(z, past), (params, latent, past), units)


def counted_parameters(tree: Any) -> int:
    """Elements of all floating-point arrays."""
    return sum(x.size for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


__all__ = ["CODEC", "Call", "Systems", "T5Config", "plannable", "recipe_program", "sampling_calls", "text_teacher"]
