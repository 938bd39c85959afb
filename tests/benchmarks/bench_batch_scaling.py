"""Recovery of a pruned system at batches x1, x4, x16 and x64 with two learning-rate rules: updates to equal loss.

    nd-jax prune apply TEACHER --count 2 --out PRUNED
    python tests/benchmarks/bench_batch_scaling.py shapes_tiny recovery --start PRUNED --latents LATENTS --json out.json

``LATENTS`` is a folder of `nd-jax data latents` or `data precompute`; its last clips are held out for the loss. What is
compared is said in `nd_jax/batch_scaling.py`. Every row is printed when it is done. An update of the largest batch
costs 64 usual ones: on a CPU take a small ``--batch``.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from nd_jax.batch_scaling import FACTORS, HELD_OUT, compare, table
from nd_jax.data.shard_sources import open_latents
from nd_jax.errors import UserError
from nd_jax.models.system import CODEC
from nd_jax.outputs import new_file
from nd_jax.recipes.flow_matching import FlowRecipe
from nd_jax.recipes.preset import FlowRun, load_preset
from nd_jax.system import load_system


class Part:
    """Some examples of a source, by their number."""

    def __init__(self, source, numbers):
        self.source, self.numbers = source, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return self.source[self.numbers[int(index)]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("run")
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, help="the usual batch, instead of the run's")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    preset, system = load_preset(options.preset), load_system(options.start)
    run = preset.run(options.run)
    if type(run) is not FlowRun:
        raise UserError(f"{options.run} is no run of flow matching; expected one that is, such as recovery")
    config = dataclasses.replace(run.recipe, train_text=False, batch=options.batch or run.recipe.batch)
    source = open_latents(options.latents, dropout=config.caption_dropout)
    clips = len(source.latents)
    kept = clips - max(config.batch, HELD_OUT)
    numbers = [n for n in range(len(source)) if n % clips < kept]

    def make(chosen):
        return FlowRecipe(
            system.config,
            chosen,
            schedule=system.schedule,
            stats=system.stats,
            sizes=[source.latents.shape[1:4]],
            text_length=system.video.text_length,
            clip_length=system.video.clip_length,
        )

    params = {name: each for name, each in system.params.items() if name != CODEC}
    rows = compare(
        make,
        config,
        params,
        Part(source, numbers),
        Part(source, range(kept, clips)),
        steps=options.steps,
        every=options.every,
        factors=options.factors,
        tell=lambda row: print(row, flush=True),
        tokenizers=system.tokenizers,
    )
    print(table(rows))
    if options.json:
        with new_file(options.json, overwrite=True) as part:
            part.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
