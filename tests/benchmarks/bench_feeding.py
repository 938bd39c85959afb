"""Samples a second that one host precomputes and loads, beside what a plan asks of every host.

    python tests/benchmarks/bench_feeding.py shapes_base
    python tests/benchmarks/bench_feeding.py neodragon_320p --no-precompute --plan plan.json

Loading: shards of random latents of the preset's shape (with ``--text`` also stored text of its length) are written to
a temporary folder and read by the pipeline that training uses, batches of ``--batch``, with 0 and ``--workers`` worker
processes. What was just written comes from the page cache: the figure is that of checking, unpacking and collating, and
a disk or bucket has to deliver the bytes that stand beside it. Precomputing: one worker's work (probe, decode, encode,
pack, write) on ``--clips`` video files of the preset's size that are made here, with the preset's codec and random
weights on this machine's devices; a first shard compiles and does not count.
``--plan`` is a file of `nd-jax plan --json`: videos a second of a step, overlapped (the most it can ask for), a host.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from nd_jax.converters.component import save_component
from nd_jax.data.latent_shards import CLIPS, EMPTY, INFO, PLAN, Example, write_shard
from nd_jax.data.pipeline import batches
from nd_jax.data.shard_sources import open_latents
from nd_jax.data.video_folder import FolderOptions
from nd_jax.data.video_out import write_video
from nd_jax.models.system import CODEC
from nd_jax.planning.chips import parse_topology
from nd_jax.precompute import begin, encode_shard, finish
from nd_jax.precompute_networks import Encoder, Job
from nd_jax.recipes.preset import load_preset

SHARDS = 4


def write_shards(preset, folder, count, text):
    """``count`` examples of random numbers in ``SHARDS`` files; their size in bytes."""
    folder.mkdir()
    rng, network = np.random.Generator(np.random.Philox(0)), preset.system.diffusion_transformer
    length = preset.video.text_length

    def example(n):
        states, pooled, ids = (), (), ()
        if text:
            tokens = length if n else 1
            ids = (tuple(range(1, tokens + 1)),)
            states = (rng.standard_normal((tokens, network.width), np.float32),)
            pooled = (rng.standard_normal(network.pooled_projection_dim, np.float32),)
        latents = rng.standard_normal((*preset.latent_size, network.in_channels), np.float32)
        return Example(f"{n}.mp4", ("a clip",), latents, ids=ids, features=states, pooled=pooled)

    per, size = -(-count // SHARDS), 0
    for index in range(SHARDS):
        rows = [example(1 + n) for n in range(index * per, min(count, (index + 1) * per))]
        size += write_shard(folder, CLIPS, index, rows, text_length=length).bytes
    if text:
        empty = example(0)
        alone = Example("", ("",), ids=empty.ids, features=empty.features, pooled=empty.pooled)
        write_shard(folder, EMPTY, 0, [alone], text_length=length)
    (folder / PLAN).write_text(json.dumps({"digest": "b", "shards": {CLIPS: SHARDS, "prompts": 0, EMPTY: int(text)}}))
    (folder / INFO).write_text(json.dumps({"records": {CLIPS: count, "prompts": 0, EMPTY: int(text)}}))
    return size


def loading(preset, folder, batch, workers, text, rounds):
    """Samples a second: the median over ``rounds`` batches, after two that do not count."""
    source = open_latents(folder, text=preset.video.text_length if text else None)
    keys = ("latents", "text", "t5_mask", "pooled") if text else ("latents",)
    stream, seconds = batches(source, batch, keys=keys, workers=workers), []
    for n in range(rounds + 2):
        began = time.perf_counter()
        next(stream)
        if n > 1:
            seconds.append(time.perf_counter() - began)
    return batch * rounds / sum(seconds), batch / statistics.median(seconds)


def precomputing(preset, folder, clips, batch):
    """Samples a second of one worker, and seconds for making the files."""
    video, rng = preset.video, np.random.Generator(np.random.Philox(1))
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)  # noqa: E731
    config = preset.system.causal_video_vae
    save_component(folder / "codec", config, jax.tree.map(draw, preset.system.definitions()[CODEC].abstract()))
    t, y, x = np.meshgrid(*(np.linspace(0, 6, n) for n in (video.frames, video.height, video.width)), indexing="ij")
    (folder / "clips").mkdir()
    for n in range(clips + batch):
        waves = np.stack([np.sin(t + n), np.sin(2 * y + t + n), np.cos(x - n * t)], axis=-1)
        write_video(folder / "clips" / f"{n:05d}.mp4", (127 + 100 * waves).astype(np.uint8), fps=video.fps)
        (folder / "clips" / f"{n:05d}.txt").write_text(f"clip {n}")
    options = FolderOptions(sizes=((video.height, video.width),), frames=video.frames, fps=video.fps, heldout=0.0)
    job = Job(folder / "clips", folder / "out", folder / "codec", None, options, batch)
    left, skipped = begin(job, shard_size=batch)
    encoder, made, began = Encoder(job), 0, None
    for place in left:
        shard = encode_shard(job, place, encoder)
        if began is None:
            began = time.perf_counter()
        else:
            made += shard.records
    seconds = time.perf_counter() - began
    finish(job, skipped)
    return made / seconds


def needs(path):
    """Of every plan in a file: its run, its slice, and the videos a second that each host has to deliver."""
    for plan in json.loads(path.read_text())["plans"]:
        if plan["run"] != "generate" and max(plan["videos_per_second"]):
            hosts = parse_topology(plan["topology"]).hosts
            yield plan["run"], plan["topology"], max(plan["videos_per_second"]) / hosts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="shapes_base")
    parser.add_argument("--batch", type=int, default=8, help="examples a host reads at once (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=64, help="in the shards that are read (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=16, help="batches that count (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument("--text", action="store_true", help="with stored text")
    parser.add_argument("--clips", type=int, default=16, help="video files that count (default: %(default)s)")
    parser.add_argument("--no-precompute", action="store_true", help="measure loading only")
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="files of nd-jax plan --json")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    preset, found = load_preset(options.preset), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_shards(preset, folder / "shards", options.examples, options.text)
        found["bytes_per_sample"] = size / options.examples
        for workers in dict.fromkeys((0, options.workers)):
            mean, median = loading(preset, folder / "shards", options.batch, workers, options.text, options.rounds)
            found[f"load, {workers} workers"] = mean
            print(
                f"load, {workers} workers: {mean:.1f} samples/s (median batch {median:.1f}), "
                f"{mean * size / options.examples / 1e6:.1f} MB/s of records"
            )
        if not options.no_precompute:
            found["precompute"] = precomputing(preset, folder, options.clips, options.batch)
            print(f"precompute, one worker on {jax.devices()[0].device_kind}: {found['precompute']:.2f} samples/s")
    best = max(rate for what, rate in found.items() if what.startswith("load"))
    for path in options.plan:
        for run, topology, need in needs(path):
            print(f"{run} on {topology} asks for {need:.1f} samples/s a host: loaded {best / need:.1f} times as fast")
            found[f"need of {run} on {topology}"] = need
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
