"""A small recipe for the tests of the training room; as a script, a verb of the command line that can be killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from nd_jax import cli
from nd_jax.data import pipeline
from nd_jax.models.hooks import ShardingHooks
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Every, LoopConfig, train
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.paths import is_key, named_leaves
from nd_jax.training.sharding import Rules
from nd_jax.training.state import TrainState

WIDTH, DEPTH, BATCH = 16, 3, 16
RULES = Rules(minimum=0)
MEASURED = {
    "steps_per_second",
    "step_seconds",
    "tokens_per_second",
    "videos_per_second",
    "data_wait",
    "goodput",
    "host_gib",
}
"""Metrics that differ between equal runs."""
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=30, clip_norm=0.5)


class Toy:
    """Learns to undo noise with stacked residual layers; uses keys, EMA, clipping and accumulation."""

    def __init__(
        self,
        *,
        rules: Rules = RULES,
        optim: OptimConfig = OPTIM,
        microbatches: int = 1,
        depth: int = DEPTH,
        hooks: ShardingHooks | None = None,
    ):
        self.rules, self.depth, self.hooks = rules, depth, hooks or ShardingHooks()
        self.optimizer = make_optimizer(optim, rules)
        self.grads = value_and_grad(self.loss, microbatches)

    def init(self, key: jax.Array) -> TrainState:
        inner, outer, noise = jax.random.split(key, 3)
        params = {
            "blocks": {
                "up": {
                    "kernel": jax.random.uniform(inner, (self.depth, WIDTH, 2 * WIDTH)) - 0.5,
                    "bias": jnp.zeros((self.depth, 2 * WIDTH)),
                },
                "down": {"kernel": jax.random.uniform(outer, (self.depth, 2 * WIDTH, WIDTH)) - 0.5},
            },
            "out": {"kernel": jnp.eye(WIDTH), "scale": jnp.ones(WIDTH)},
        }
        return TrainState.create(params, self.optimizer, noise, ema=True)

    def predict(self, params, x):
        def body(x, layer):
            x = self.hooks.constrain(x, "x")
            up, down = self.hooks.gather(layer["up"]["kernel"]), self.hooks.gather(layer["down"]["kernel"])
            return x + jnp.tanh(x @ up + layer["up"]["bias"]) @ down, None

        x, _ = jax.lax.scan(body, x, params["blocks"])
        return (x @ params["out"]["kernel"]) * params["out"]["scale"]

    def loss(self, params, examples):
        error = jnp.mean((self.predict(params, examples["x"] + examples["noise"]) - examples["x"]) ** 2)
        return error, {"size": jnp.mean(examples["x"] ** 2)}

    def step(self, state, batch):
        noise = jax.random.uniform(state.step_key(), batch["x"].shape)
        grads, metrics = self.grads(state.params, {"x": batch["x"], "noise": noise})
        state, told = state.advance(grads, self.optimizer)
        return state, {**metrics, **told}

    def batch_spec(self):
        return {"x": jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)}


def draw(index: int) -> dict[str, np.ndarray]:
    """Example number ``index``."""
    generator = np.random.Generator(np.random.Philox(int(index)))
    return {"x": np.outer(generator.normal(size=2), np.ones(WIDTH // 2)).reshape(-1).astype(np.float32)}


def batches(seed: int = 0) -> grain.DatasetIterator:
    """An endless, seeded, checkpointable stream of this process's examples."""
    count = jax.process_count()
    dataset = grain.MapDataset.range(200).shuffle(seed).repeat()[jax.process_index() :: count]
    dataset = dataset.map(draw).batch(BATCH // count)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def run(folder: Path, *, steps: int, mesh: Mesh, **options):
    """Trains the toy with the tests' settings; ``options`` are fields of ``LoopConfig`` or arguments of ``train``."""
    fields = {field.name for field in dataclasses.fields(LoopConfig)}
    config = LoopConfig(steps=steps, **{"save_every": 4} | {name: options[name] for name in fields & options.keys()})
    options = {"preset": "toy", "quiet": True} | {name: options[name] for name in options.keys() - fields}
    recipe = options.pop("recipe", None) or Toy(hooks=sharding_hooks(mesh, RULES))
    return train(recipe, options.pop("stream", None) or batches(), config, folder, mesh=mesh, **options)


def probe(step: int, _) -> dict[str, float]:
    """A callback that logs something of its own."""
    return {"probe": step / 7}


def command(
    folder: Path,
    steps: int,
    data: int = 1,
    fsdp: int = 1,
    save_every: int = 4,
    keep: int = 2,
    slow: float = 0.0,
    pause: int = 0,
    strike: int = 0,
    strikes: int = 1,
    fail: int = 0,
    workers: int = 0,
    loud: bool = False,
    port: int = 0,
    index: int = 0,
) -> int:
    """The toy as a verb: exit codes and messages are the command line's.

    Args:
        folder: of the run.
        steps: of the whole run.
        data: size of that mesh axis.
        fsdp: size of that mesh axis.
        save_every: steps between checkpoints.
        keep: checkpoints.
        slow: seconds that every step takes longer.
        pause: step at which to stall, for whoever wants to strike.
        strike: step at which to send Ctrl-C to itself.
        strikes: how many of them.
        fail: step at which a callback raises.
        workers: processes that read the data, in another order than without.
        loud: tell what it does.
        port: of the first of two processes that train together.
        index: which of the two this is.
    """
    if port:
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)

    def every(step: int, _) -> None:
        time.sleep(600 if step == pause else slow)
        for _ in range(strikes if step == strike else 0):
            os.kill(os.getpid(), signal.SIGINT)
        if step == fail:
            raise RuntimeError("a mistake in a callback")

    callbacks = [Every(1, every), Every(5, probe)] if slow or pause or strike or fail else [Every(5, probe)]
    mesh = make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    options = {"save_every": save_every, "keep": keep, "quiet": not loud, "callbacks": callbacks}
    if workers:
        options["stream"] = pipeline.batches([draw(n) for n in range(200)], BATCH, keys=("x",), workers=workers)
    outcome = run(folder, steps=steps, mesh=mesh, **options)
    return 0 if outcome.finished else 130


def numbers(state) -> dict[str, np.ndarray]:
    """Every leaf of a state, on the host."""
    return {name: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for name, leaf in named_leaves(state)}


def assert_same(found: dict, expected: dict) -> None:
    """Bit-equal, by name."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@contextmanager
def compiled_once(folder: Path) -> Iterator[dict[str, str]]:
    """Compiled programs are shared through ``folder``; yields the environment that makes other processes share them."""
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in wanted.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


if __name__ == "__main__":
    cli.VERBS["toy"] = "training_toy:command"
    sys.exit(cli.main(["toy", *sys.argv[1:]]))
