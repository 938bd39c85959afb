"""A small recipe for the tests of the training room; run as a script it trains in a process that can be killed."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nd_jax.models.hooks import ShardingHooks
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Every, LoopConfig, train
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.sharding import Rules
from nd_jax.training.state import TrainState

WIDTH, DEPTH, BATCH = 16, 3, 16
RULES = Rules(minimum=0)
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
    """An endless, seeded, checkpointable stream."""
    dataset = grain.MapDataset.range(200).shuffle(seed).repeat().map(draw).batch(BATCH)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def run(folder: Path, *, steps: int, mesh: Mesh, **options):
    """Trains the toy with the tests' settings; ``options`` are fields of ``LoopConfig`` or arguments of ``train``."""
    fields = {field.name for field in dataclasses.fields(LoopConfig)}
    config = LoopConfig(steps=steps, **{"save_every": 4} | {name: options[name] for name in fields & options.keys()})
    options = {"preset": "toy", "quiet": True} | {name: options[name] for name in options.keys() - fields}
    recipe = options.pop("recipe", None) or Toy(hooks=sharding_hooks(mesh, RULES))
    return train(recipe, options.pop("stream", None) or batches(), config, folder, mesh=mesh, **options)


if __name__ == "__main__":
    # Stalls at a step, for whoever started this to strike.
    pause = Every(int(sys.argv[3]), lambda *_: time.sleep(600))
    run(Path(sys.argv[1]), steps=int(sys.argv[2]), mesh=make_mesh(MeshConfig(data=2, fsdp=4)), callbacks=[pause])
