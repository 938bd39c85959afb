"""``nd-jax npu compile``, ``emulate``, ``handover`` and ``compare``: a bundle's graphs on Hexagon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction

from nd_jax.commands.console import check_at_least, say, warn
from nd_jax.commands.generate import read_prompts
from nd_jax.commands.npu import runtime_errors
from nd_jax.errors import UserError
from nd_jax.outputs import check_new

Targets = Annotated[tuple[str, ...], UseAppendAction]


def npu_compile(
    bundle: Positional[Path],
    target: Targets = (),
    graphs: tuple[str, ...] = (),
    timeout: int = 3600,
    shared: bool = True,
) -> None:
    """Hexagon context binaries of a bundle's graphs, put into the bundle; needs the extra hexagon.

    Args:
        bundle: folder written by `npu build`.
        target: chip, such as sm8750 or sc8380xp; may be given more than once.
        graphs: which graphs; default: all.
        timeout: seconds for one graph.
        shared: the denoiser's stages also in one binary that holds their weights once.
    """
    from nd_jax.converters.bundle.targets import chosen, named

    check_at_least(1, timeout=timeout)
    targets = chosen(named(target))
    with runtime_errors():
        from nd_jax.converters.hexagon.compile import compile_graphs
        from nd_jax.converters.hexagon.extra import licence_line, require
        from nd_jax.converters.hexagon.shared import compile_shared, stage_graphs
        from nd_jax.converters.hexagon.sizes import size_lines
        from nd_jax.converters.runtime.manifest import Bundle

        require()
        say(licence_line())
        compile_graphs(bundle, targets, graphs, timeout=timeout, say=say)
        stages = set(stage_graphs(Bundle(bundle)))
        if shared and len(stages) > 1 and stages <= set(graphs or stages):
            for each in targets:
                compile_shared(bundle, each, timeout=timeout * len(stages), say=say)
        for each in targets:
            for line in size_lines(Bundle(bundle), each.name):
                say(line)
    print(bundle)


def npu_emulate(
    bundle: Positional[Path],
    target: Targets = (),
    graphs: tuple[str, ...] = (),
    videos: int = 0,
    prompts: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    timeout: int = 3600,
) -> None:
    """Compiled graphs in Qualcomm's emulator: SNR of each on the bundle's test vectors, and whole videos.

    What it says of accuracy holds for the NPU; it says nothing of speed. The figures go into the bundle's manifest.

    Args:
        bundle: folder with what `npu compile` made.
        target: chip; may be given more than once.
        graphs: which graphs; default: all that are compiled.
        videos: whole videos to make with every graph in the emulator.
        prompts: text file with one prompt per line; default for shapes bundles: captions, whose videos are judged.
        out: new folder for the videos, as mp4, those of the CPU's graphs beside them.
        seed: of the videos' noise, and of vectors where the bundle has none yet.
        timeout: seconds for one graph, or for all videos.
    """
    from nd_jax.converters.bundle.targets import chosen, named

    check_at_least(0, seed=seed, videos=videos)
    check_at_least(1, timeout=timeout)
    targets = chosen(named(target))
    if out is not None:
        check_new(out, overwrite=False)
    with runtime_errors():
        from nd_jax.converters.hexagon.emulate import emulate_graphs
        from nd_jax.converters.hexagon.extra import licence_line, require
        from nd_jax.converters.hexagon.section import compiled
        from nd_jax.converters.runtime.manifest import Bundle
        from nd_jax.hexagon_workflow import has_vectors, judged_videos, need_vectors

        require()
        say(licence_line())
        opened = Bundle(bundle)
        for each in targets:
            compiled(opened, each.name)
        lines, labels = [], None
        if videos or not has_vectors(opened):
            lines, labels = _lines_and_labels(opened, prompts, max(videos, 2), seed=seed)
            need_vectors(opened, lines, seed=seed, say=say)
        for each in targets:
            found = emulate_graphs(
                bundle, each, graphs, timeout=timeout, say=lambda line, t=each: say(f"{t.name} {line}")
            )
            for name, told in found.items():
                lost = told["cpu_to_fp32"] - told["emulator_to_fp32"]
                if lost > 1 and opened.graph(name)["precision"] != "fp16":
                    warn(f"{name}: the emulator is {lost:.1f} dB below the same graph on the CPU")
            if videos:
                judged = judged_videos(
                    bundle, each, lines[:videos], labels, seed=seed, timeout=timeout, out=out, say=say
                )
                print(json.dumps({"target": each.name, **judged}))
    print(bundle)


def _lines_and_labels(bundle: Any, path: Path | None, count: int, *, seed: int) -> tuple[list[str], Any]:
    """Prompts from a file, or captions of the shapes world with what they name, for a bundle of its size.

    Raises UserError where there are fewer than ``count``.
    """
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named

    world, size = world_named("64x64"), (bundle["video"]["height"], bundle["video"]["width"])
    if path is not None:
        lines = [line for line in read_prompts((), path) if line.strip()]
        if len(lines) < count:
            raise UserError(f"npu: {path} has {len(lines)} prompts; expected at least {count}")
        return lines[:count], None
    if size != (world.height, world.width):
        raise UserError(f"npu: videos of {size[0]}x{size[1]}; expected --prompts FILE with at least {count} lines")
    lines, labels = world_prompts(world, "seen", count, seed=seed + 1)
    return lines, labels


def npu_handover(
    bundle: Positional[Path], target: str = "", out: Path = Path("handover"), overwrite: bool = False
) -> None:
    """What a phone engineer needs for one target: binaries, wrappers, vectors with expected outputs, scripts.

    Args:
        bundle: folder with what `npu compile` made.
        target: chip.
        out: folder to write.
        overwrite: replace an existing one.
    """
    from nd_jax.converters.bundle.targets import chosen, named
    from nd_jax.outputs import new_folder

    (each,) = chosen(named((target,)))
    check_new(out, overwrite=overwrite)
    with runtime_errors():
        from nd_jax.converters.hexagon.handover import hand_over

        with new_folder(out, overwrite=overwrite) as folder:
            names = hand_over(bundle, each, folder)
    say(f"{len(names)} graphs for {each.name}; libraries come from your own QAIRT SDK")
    print(out)


def npu_compare(pulled: Positional[Path], bundle: Path = Path("bundle"), target: str = "") -> None:
    """What came back from a device beside the bundle's expectations; SNR and latencies go into its manifest.

    Args:
        pulled: folder that push_and_run.sh or windows_run.py made.
        bundle: what was handed over.
        target: chip.
    """
    from nd_jax.converters.bundle.targets import chosen, named

    (each,) = chosen(named((target,)))
    with runtime_errors():
        from nd_jax.converters.hexagon.compare import compare

        compare(bundle, pulled, each, print)
