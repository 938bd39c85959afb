"""The plan of a preset on a slice: every run compiled, priced and summed up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from nd_jax.errors import UserError
from nd_jax.planning.bounds import Bounds
from nd_jax.planning.chips import Topology
from nd_jax.planning.compiled import DoesNotFit, Reading, read_program, topology_devices
from nd_jax.planning.demand import Demand, demand
from nd_jax.planning.programs import Systems, counted_parameters, recipe_program, sampling_calls
from nd_jax.planning.splits import recipe_split
from nd_jax.planning.sweeping import sweep_calls
from nd_jax.planning.traced import traced_flops
from nd_jax.recipes.preset import Preset, as_settings
from nd_jax.training.mesh import MeshConfig, batch_ways, make_mesh

SPARE = 0.1
"""Share of a chip's memory that a fitting program leaves free."""
GENERATE, SWEEP = "generate", "sweep"
SWEEP_PROMPTS, SWEEP_CHUNK, SWEEP_BATCH = 16, 32, 8
"""Prompts of a sweep, candidates of a device in a call and videos at a time, as its command has them."""
KERNELS = (
    "part of flops_compiled that custom calls of splash attention compute; their text does not tell, so it is the "
    "formula for the tiles that the static mask leaves (2 products forward, 7 backward). flops_analytic has dense "
    "attention over every pair of a layout instead"
)
"""What the JSON says of kernels."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line may change."""

    batch: int | None = None
    mesh: MeshConfig | None = None
    efficiency: float = 0.75
    """Share of their peak that matrix units reach on products of these sizes; derates the bound."""
    text_tokens: int | None = None
    removed: int = 6
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the run's recipe, e.g. ("every_unit", True)."""


def plan_run(preset: Preset, name: str, topology: Topology, settings: Settings = Settings()) -> dict[str, Any]:
    """One run (or ``generate``) on one slice, as JSON-able content. Raises UserError for what does not fit."""
    devices = topology_devices(topology)
    if name == GENERATE:
        return _plan_sampling(preset, topology, settings, devices)
    if name == SWEEP:
        return _plan_sweep(preset, topology, settings, devices)
    preset = changed(preset, name, settings)
    systems = Systems.of(preset, settings.removed)
    probe = recipe_program(preset, name, make_mesh(MeshConfig(), jax.devices()[:1]), removed=settings.removed)
    sizes = settings.mesh or _split(preset, probe.recipe, topology, name)
    mesh = make_mesh(sizes, devices)
    program = recipe_program(preset, name, mesh, removed=settings.removed)
    what = f"{preset.name} {name} on {topology.name}, batch {program.recipe.config.batch}"
    reading = read_program(what, program.compile_step, topology, mesh)
    # Traced without a mesh: constraints change nothing about what is multiplied.
    analytic = traced_flops(probe.recipe.step, probe.state, probe.batch)
    needed = demand(preset, systems, program.recipe, settings.text_tokens)
    steps = preset.run(name).loop.steps
    told = _told(reading, topology, settings, analytic, needed, steps)
    return {
        "preset": preset.name,
        "run": name,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch": program.recipe.config.batch,
        "recipe": as_settings(program.recipe.config),
        "parameters": counted_parameters(program.state.params),
        "state_elements": counted_parameters(program.state),
        **told,
    }


def changed(preset: Preset, name: str, settings: Settings) -> Preset:
    """The preset with the run's recipe as the settings want it. Raises UserError for a field it does not have."""
    run = preset.run(name)
    changes = dict(settings.changes) | ({} if settings.batch is None else {"batch": settings.batch})
    for field in changes:
        if field not in type(run.recipe).__dataclass_fields__:
            raise UserError(f"plan: run {name} has no setting {field!r}")
    run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **changes))
    return dataclasses.replace(preset, runs={**preset.runs, name: run})


def _split(preset: Preset, recipe: Any, topology: Topology, name: str) -> MeshConfig:
    try:
        return recipe_split(topology.chips, recipe)
    except UserError as error:
        raise UserError(f"{preset.name} {name} on {topology.name}: {error}") from None


def _told(
    reading: Reading, topology: Topology, settings: Settings, analytic: float, needed: Demand, steps: int
) -> dict[str, Any]:
    chips, chip = topology.chips, topology.chip
    useful = analytic if needed.flops is None else needed.flops
    compiled = reading.flops * chips
    return {
        **_memory(reading, topology),
        "compile_seconds": reading.seconds_to_compile,
        "flops_compiled": compiled,
        "flops_kernels": reading.kernel_flops * chips,
        "flops_kernels_note": KERNELS,
        "flops_analytic": analytic,
        "flops_difference": compiled / analytic - 1,
        "flops_useful": useful,
        "useful_of_compiled": useful / compiled,
        "padding": {
            "image_tokens_used": needed.image_share,
            "text_tokens_used": needed.text_share,
            "forward_flops_used": needed.flops_share,
        },
        "hbm_bytes": reading.hbm_bytes,
        "wire_bytes": reading.wire,
        "unknown_loops": reading.unknown_loops,
        **speed(reading.bounds, settings.efficiency, useful / (chip.flops * chips), needed.tokens, needed.videos),
        "steps": steps,
        "chip_hours": [steps * t * chips / 3600 for t in (reading.bounds.overlapped, reading.bounds.serial)],
    }


def _memory(reading: Reading, topology: Topology) -> dict[str, Any]:
    hbm = topology.chip.hbm_gib
    return {
        "argument_gib": reading.argument,
        "temporary_gib": reading.temporary,
        "peak_gib": reading.peak,
        "code_gib": reading.code,
        "hbm_gib": hbm,
        "fits_with_spare": reading.held <= (1 - SPARE) * hbm,
    }


def speed(bound: Bounds, efficiency: float, ideal: float, tokens: float, videos: float) -> dict[str, Any]:
    """Intervals from all parts overlapped to none; ``ideal`` is the seconds that useful work takes at the peak."""
    pair, slow = (bound.overlapped, bound.serial), bound.derated(efficiency)
    return {
        "seconds": {"compute": bound.compute, "memory": bound.memory, "wire": bound.wire},
        "limit": bound.limit,
        "step_seconds": list(pair),
        "mfu": [ideal / t for t in pair],
        "efficiency": efficiency,
        "mfu_derated": [ideal / t for t in (slow.overlapped, slow.serial)],
        "tokens_per_second": [tokens / t for t in pair],
        "videos_per_second": [videos / t for t in pair],
    }


def _plan_sampling(preset: Preset, topology: Topology, settings: Settings, devices: list) -> dict[str, Any]:
    """All programs that sampling runs, one prompt and all weights a chip unless told otherwise (gathering them for
    every call would take longer than multiplying by them); sums over a whole video."""
    prompts = settings.batch or topology.chips
    mesh = make_mesh(settings.mesh or MeshConfig(data=-1, fsdp=1), devices)
    if prompts % batch_ways(mesh):
        told = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"generate: {prompts} prompts do not divide by mesh axes {told}; use a multiple of {batch_ways(mesh)}"
        )
    network = preset.system.diffusion_transformer
    total, programs, analytic = Bounds(0, 0, 0), [], 0.0
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    plain = sampling_calls(preset, network, alone, prompts)
    for call, single in zip(sampling_calls(preset, network, mesh, prompts), plain, strict=True):
        what = f"{preset.name} generate ({call.name}) on {topology.name}, {prompts} prompts"
        lowered = jax.jit(call.function).lower(*call.arguments)
        reading = read_program(what, lowered.compile, topology, mesh)
        total += reading.bounds.times(call.times)
        one = traced_flops(single.function, *single.arguments)
        analytic += one * call.times
        programs.append(_program(call.name, call.times, reading, reading.flops, one, topology))
    ideal = analytic / (topology.chip.flops * topology.chips)
    return {
        "preset": preset.name,
        "run": GENERATE,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch": prompts,
        "programs": programs,
        "flops_analytic": analytic,
        **speed(total, settings.efficiency, ideal, 0, prompts),
    }


def _program(
    name: str, calls: int, reading: Reading, flops: float, analytic: float, topology: Topology
) -> dict[str, Any]:
    """One of several programs; ``flops`` of a chip, ``analytic`` of all."""
    return {
        "program": name,
        "calls": calls,
        "flops_compiled": flops * topology.chips,
        "flops_analytic": analytic,
        "wire_bytes": reading.wire,
        **_memory(reading, topology),
    }


def _plan_sweep(preset: Preset, topology: Topology, settings: Settings, devices: list) -> dict[str, Any]:
    """A chunk of candidates of the pruned size on every chip: the real programs' memory, and the time of programs that
    run every candidate in full, so that what candidates share comes on top of the candidates a second."""
    layers, batch = preset.system.diffusion_transformer.num_layers - settings.removed, settings.batch or SWEEP_BATCH
    if not layers >= 1:
        raise UserError(f"plan: {settings.removed} blocks removed; expected fewer than there are layers")
    mesh, alone = make_mesh(MeshConfig(data=-1, fsdp=1), devices), make_mesh(MeshConfig(), jax.devices()[:1])
    count = SWEEP_CHUNK * batch_ways(mesh)
    options = {"layers": layers, "chunk": SWEEP_CHUNK, "prompts": SWEEP_PROMPTS, "batch": batch}
    total, programs, analytic = Bounds(0, 0, 0), [], 0.0
    singles = sweep_calls(preset, alone, **options)
    for call, single in zip(sweep_calls(preset, mesh, **options), singles, strict=True):
        what = f"{preset.name} sweep (stage {call.stage}) on {topology.name}, {SWEEP_CHUNK} candidates a chip"
        real = read_program(what, jax.jit(call.function).lower(*call.arguments).compile, topology, mesh)
        plain = read_program(what, jax.jit(call.plain).lower(*call.plain_arguments).compile, topology, mesh)
        total += plain.bounds.times(call.times)
        one = traced_flops(single.plain, *single.plain_arguments) * topology.chips
        analytic += one * call.times
        programs.append(_program(f"stage {call.stage}", call.times, real, plain.flops, one, topology))
    most = max(programs, key=lambda each: each["argument_gib"] + each["temporary_gib"])
    ideal = analytic / (topology.chip.flops * topology.chips)
    return {
        "preset": preset.name,
        "run": SWEEP,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch": batch,
        "layers": layers,
        "candidates": count,
        "programs": programs,
        "flops_analytic": analytic,
        "flops_compiled": sum(each["flops_compiled"] * each["calls"] for each in programs),
        **{name: most[name] for name in ("argument_gib", "temporary_gib", "peak_gib", "hbm_gib", "fits_with_spare")},
        "wire_bytes": most["wire_bytes"],
        **speed(total, settings.efficiency, ideal, 0, count * SWEEP_PROMPTS),
        "candidates_per_second": [count / t for t in (total.overlapped, total.serial)],
    }


def largest_batch(
    preset: Preset,
    name: str,
    topology: Topology,
    settings: Settings = Settings(),
    *,
    most_compiles: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The plan with the largest batch that fits with ``SPARE`` left, every chip having equally many rows.

    Temporaries grow with the rows of a chip almost linearly: two compilations tell how many should fit, and only
    batches near that are tried. Raises ``DoesNotFit`` when not even one row does.
    """
    unit = topology.chips * _columns(preset, name, settings)
    tried: dict[int, dict[str, Any] | None] = {}

    def attempt(rows: int) -> dict[str, Any] | None:
        if rows not in tried:
            try:
                plan = plan_run(preset, name, topology, dataclasses.replace(settings, batch=rows * unit))
                tried[rows] = plan if plan["fits_with_spare"] else None
                say(f"batch {rows * unit}: peak {plan['peak_gib']:.2f} GiB of {plan['hbm_gib']:.2f}")
            except DoesNotFit as error:
                if rows == 1:
                    raise
                tried[rows] = None
                say(str(error))
        return tried[rows]

    first, second = attempt(1), attempt(2)
    if first is None or second is None:
        if first is None:
            raise DoesNotFit(f"{preset.name} {name} on {topology.name}, batch {unit}", None, topology.chip.hbm_gib)
        return first
    held = [plan["argument_gib"] + plan["temporary_gib"] for plan in (first, second)]
    room = (1 - SPARE) * first["hbm_gib"] - held[1]
    guess = 2 + int(room / max(held[1] - held[0], 1e-3))
    while len(tried) < most_compiles and guess > 2:
        if attempt(guess) is not None:
            return attempt(guess)
        guess = max(2, int(guess * 0.8))
    best = max(rows for rows, plan in tried.items() if plan is not None)
    return tried[best]


def _columns(preset: Preset, name: str, settings: Settings) -> int:
    config = changed(preset, name, dataclasses.replace(settings, batch=None)).run(name).recipe
    if not hasattr(config, "stage_mix"):
        return 1
    units = preset.latent_size[0] if config.every_unit else 1
    return sum(config.stage_mix) * sum(config.size_mix) * units
