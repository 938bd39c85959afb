"""Flow matching three ways, in turn, in one process: a plain forward-backward, the bare step and the training loop.

    python tests/benchmarks/bench_loop.py                        # the shapes_base teacher
    python tests/benchmarks/bench_loop.py shapes_tiny teacher --rounds 8 --json loop.json

``plain``: ``jax.jit(jax.value_and_grad(...))`` of the denoiser on ready-made examples. ``step``: the recipe's step,
called in a Python loop on one batch: text encoders, draws, pyramid, denoiser, optimizer and EMA, with the state
donated. ``loop``: ``nd-jax train`` on a latents folder, that is the step with Grain, tokenizers, metrics and progress;
checkpoints are left out.

Random parameters and latents, real captions. A round is ``--steps`` steps of each, and the ratios are medians over the
rounds, by the wall clock and by the process's CPU time, so that another load on the machine hits all three alike. The
gap is the share of time in which the loop had handed nothing to the device. Goals: loop / step at most 1.10, gap below
5 %, one compilation.
"""

import argparse
import dataclasses
import itertools
import json
import os
import queue
import statistics
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from nd_jax import datasets, workflow
from nd_jax.converters.component import save_component
from nd_jax.data.captions import corpus
from nd_jax.data.latents import write_latents
from nd_jax.models.system import CODEC, DENOISER
from nd_jax.pyramid.layout import REAL, layout_arrays
from nd_jax.pyramid.targets import flow_loss
from nd_jax.recipes.preset import FlowRun, load_preset
from nd_jax.training import loop
from nd_jax.training.program import Program

WORK, CLIPS, CAPTIONS_PER_CLIP = ("plain", "step", "loop"), 256, 4


class Watch(threading.Thread):
    """When each of the loop's steps was handed to the device, and when it was done; seconds, oldest first."""

    def __init__(self):
        super().__init__(daemon=True)
        self.handed, self.times = queue.Queue(), []

    def run(self):
        while True:
            dispatched, packed = self.handed.get()
            jax.block_until_ready(packed)
            self.times.append((dispatched, time.perf_counter()))
            self.handed.task_done()

    def program(self):
        """The loop's ``Program``, watched."""
        handed = self.handed

        class Watched(Program):
            def compile_step(self):
                run = super().compile_step()

                def step(state, batch):
                    state, packed = run(state, batch)
                    handed.put((time.perf_counter(), packed))
                    return state, packed

                return step

        return Watched

    def gap(self):
        """Share of the time since the last call, from its first step on, in which no step was under way."""
        self.handed.join()
        times, self.times = self.times, []
        idle = sum(max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(times))
        return idle / (times[-1][1] - times[0][0])


class Stopwatch:
    """Wall-clock and CPU seconds (all threads) of each work, round by round."""

    def __init__(self):
        self.seconds = {name: [] for name in WORK}

    def start(self):
        self._began = time.perf_counter(), time.process_time()

    def stop(self, name):
        wall, cpu = self._began
        self.seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))

    def ratio(self, name, base, clock):
        """Median over the rounds."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(one[clock] / other[clock] for one, other in pairs)


def ready_made(recipe, params, batch):
    """What the recipe's loss hands to the denoiser, as arrays: clips, text, pooled text, timesteps and layouts."""

    def inputs(params, batch, key):
        seen = []

        def denoiser(_, sample, *rest, **__):
            seen.extend([sample, *rest])
            return [clips[-1] for clips in sample]

        rows = recipe.config.batch // len(recipe.columns)
        examples = {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in batch.items()}
        with mock.patch.dict(recipe.definitions, {DENOISER: denoiser}):
            recipe.loss(params, examples | recipe.draws(key))
        return seen

    return jax.jit(inputs)(params, batch, jax.random.key(1))


def plain_step(recipe, params, inputs):
    """The denoiser's forward and backward pass on ready-made examples, compiled."""
    network, targets = recipe.definitions[DENOISER], [clips[-1] for clips in inputs[0]]

    def loss(params, inputs):
        return flow_loss(network(params, *inputs, remat=recipe.config.remat), targets)

    return jax.jit(jax.value_and_grad(loss)).lower(params, inputs).compile()


def tokens(recipe, batch):
    """Tokens of the denoiser's sequences in one step: all, and how many are not padding (mean over the units)."""
    rows, real = recipe.config.batch // len(recipe.columns), 0.0
    for envelope, size in zip(recipe.envelopes, recipe.column_sizes, strict=True):
        units = recipe.sizes[size][0]
        layout = layout_arrays(envelope, np.arange(units, dtype=np.int32))
        image = np.asarray(layout.segments)[:, envelope.text_length :] == REAL
        real += rows * image.sum() / units
    return rows * sum(envelope.length for envelope in recipe.envelopes), real + float(batch["t5_mask"].sum())


def measured(recipe, stream, config, folder, *, steps, results, mesh, given=(), **options):
    """``nd_jax.training.loop.train``, with the other two works between its rounds; the first round does not count."""
    batch = next(stream)
    program = Program(recipe, mesh, jax.random.key(0), given)
    box, on_device, step = [program.initial_state()], program.put(batch), program.compile_step()
    params = jax.tree.map(jnp.copy, box[0].params)  # the step donates its own
    inputs = ready_made(recipe, params, on_device)
    plain = plain_step(recipe, params[DENOISER], inputs)

    def run_plain():
        for _ in range(steps):
            out = plain(params[DENOISER], inputs)
        jax.block_until_ready(out)

    def run_step():
        for _ in range(steps):
            box[0], out = step(box[0], on_device)
        jax.block_until_ready(out)

    run_plain(), run_step()  # the first calls do not count
    watch, stopwatch, gaps = Watch(), Stopwatch(), []
    watch.start(), stopwatch.start()

    def between(done, _):
        stopwatch.stop("loop")
        gap = watch.gap()
        if done == steps:
            stopwatch.seconds["loop"].clear()
        else:
            gaps.append(gap)
            others = [("plain", run_plain), ("step", run_step)]
            for name, work in others[:: 1 if done // steps % 2 else -1]:
                stopwatch.start()
                work()
                stopwatch.stop(name)
        stopwatch.start()

    with mock.patch.object(loop, "Program", watch.program()), Path(os.devnull).open("w") as nowhere:
        options |= {"quiet": False, "console": Console(file=nowhere, force_terminal=True)}
        callbacks = [loop.Every(steps, between)]
        outcome = loop.train(recipe, stream, config, folder, mesh=mesh, given=given, callbacks=callbacks, **options)
    (count, useful), compiled = tokens(recipe, batch), outcome.step_compilations + outcome.other_compilations
    results |= {"gap": statistics.median(gaps), "compilations": compiled, "work": {}}
    for name in WORK:
        rate = steps / statistics.median(wall for wall, _ in stopwatch.seconds[name])
        figures = {"steps_per_second": rate, "tokens_per_second": rate * count, "useful_per_second": rate * useful}
        for base in ("plain", "step"):
            for clock, kind in enumerate(("wall", "cpu")):
                figures[f"{kind}_over_{base}"] = stopwatch.ratio(name, base, clock)
        results["work"][name] = figures
    return outcome


def prepare(preset, run, folder):
    """Random latents (one folder for each size) with captions, tokenizers and a codec, as ``train_flow`` wants them."""
    rng, captions = np.random.Generator(np.random.Philox(0)), corpus(count=CLIPS * CAPTIONS_PER_CLIP)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)  # noqa: E731
    config = preset.system.causal_video_vae
    save_component(folder / "codec", config, jax.tree.map(draw, preset.system.definitions()[CODEC].abstract()))
    frames, height, width = preset.latent_size
    texts = [captions[n::CLIPS][:CAPTIONS_PER_CLIP] for n in range(CLIPS)]
    latents = []
    for index, _ in enumerate(run.recipe.size_mix):
        objects = 2 if 0 < index == len(run.recipe.size_mix) - 1 else 1  # the last share is the wider world's
        shape = (CLIPS, frames, height, width * objects, preset.system.diffusion_transformer.in_channels)
        latents.append(write_latents(folder / f"latents_{index}", [rng.standard_normal(shape, np.float32)], texts))
    tokenizers = datasets.prepare_tokenizers(preset, captions, folder / "tokenizers")
    return {"latents": latents, "codec_folder": folder / "codec", "tokenizers": tokenizers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="shapes_base")
    parser.add_argument("run", nargs="?", default="teacher", help="one of its flow-matching runs")
    parser.add_argument("--rounds", type=int, default=6, help="rounds that count (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    preset = load_preset(options.preset)
    run = preset.run(options.run)
    if options.rounds < 1 or options.steps < 2 or not isinstance(run, FlowRun):
        parser.error("expected a flow-matching run and at least one round of two steps")
    settings = dataclasses.replace(run.loop, steps=(options.rounds + 1) * options.steps, save_every=0, max_seconds=None)
    run, results = dataclasses.replace(run, loop=settings), {}

    def train(*args, **given):
        return measured(*args, steps=options.steps, results=results, **{k: v for k, v in given.items() if k != "quiet"})

    with tempfile.TemporaryDirectory() as name, mock.patch.object(workflow, "train", train):
        folder = Path(name)
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # the loop's step is the bare one
        workflow.train_flow(preset, options.run, run, folder / "out", **prepare(preset, run, folder))

    print(f"{'work':<7}{'steps/s':>9}{'tokens/s':>10}{'useful/s':>10}{'/ plain':>9}{'cpu':>6}{'/ step':>9}{'cpu':>6}")
    for name, x in results["work"].items():
        rates = f"{x['steps_per_second']:>9.2f}{x['tokens_per_second']:>10.0f}{x['useful_per_second']:>10.0f}"
        ratios = f"{x['wall_over_plain']:>9.2f}{x['cpu_over_plain']:>6.2f}{x['wall_over_step']:>9.2f}"
        print(f"{name:<7}{rates}{ratios}{x['cpu_over_step']:>6.2f}")
    print(f"gap {100 * results['gap']:.1f} %, programs compiled by the loop: {results['compilations']}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
