"""Full-size networks on this machine: seconds, peak memory, GFLOP/s, and the ratio to PyTorch where it is installed.

    python tests/benchmarks/bench_networks.py            # everything, each piece of work in a process of its own
    python tests/benchmarks/bench_networks.py decode     # one piece

Random weights, float32, median of three runs after one that is not counted. PyTorch's networks do the same arithmetic
(``torch_peers.py``) on as many threads; the ratio is ours / theirs, both measured in this run.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time

UNIT, TEXT, LATENT = 6, 128, (40, 64)
STAGES = {"denoiser-0": 0, "denoiser-1": 1, "denoiser-2": 2}
WORK = (*STAGES, "encode", "decode")


def denoiser(stage):
    """Four full-width blocks (three and the last one) at a stage's envelope for unit 6."""
    import jax
    import jax.numpy as jnp

    from nd_jax.models.mmdit import MMDiTConfig, definition
    from nd_jax.pyramid.layout import envelopes, layout_arrays

    config = MMDiTConfig(num_layers=4)
    network, envelope = definition(config), envelopes(UNIT, TEXT, *LATENT)[stage]
    params = weights(network)
    clips = [jnp.ones((1, *clip, config.in_channels)) for clip in envelope.clips]
    text, pooled = jnp.ones((1, TEXT, config.width)), jnp.ones((1, config.pooled_projection_dim))
    layout = layout_arrays(envelope, UNIT)
    run = jax.jit(lambda p: network(p, [clips], text, pooled, jnp.array([500.0]), [layout]))
    flops = 4 * (24 * envelope.length * config.width**2 + 4 * envelope.length**2 * config.width)
    return lambda: jax.block_until_ready(run(params)), flops


def encode():
    """One frame of 320x512 to moments."""
    import jax
    import jax.numpy as jnp

    from nd_jax.models.causal_vae import AsymmetricVAEConfig, definition

    codec = definition(AsymmetricVAEConfig())
    params, frame = weights(codec), jnp.ones((1, 1, 320, 512, 3))
    run = jax.jit(lambda p, x: codec.bind(p).encode(x))
    return lambda: jax.block_until_ready(run(params, frame)), 0.73e12


def decode():
    """49 frames of 320x512 from 7 latent frames, one latent frame at a time."""
    import jax
    import jax.numpy as jnp

    from nd_jax.models.causal_vae import AsymmetricVAEConfig, definition
    from nd_jax.models.streaming import decode_stream

    codec = definition(AsymmetricVAEConfig())
    params, latent = weights(codec), jnp.ones((1, 7, *LATENT, 16))

    def run():
        for video in decode_stream(codec, params, latent):
            jax.block_until_ready(video)

    return run, 2.9e12


def weights(network):
    """Random numbers of the right shapes, cheaply."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.Generator(np.random.Philox(0))
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, dtype=np.float32) * 0.02)  # noqa: E731
    return jax.tree.map(draw, network.abstract())


def torch_work(name):
    """The same piece of work in PyTorch."""
    import torch
    import torch_peers

    torch.set_num_threads(2)
    if name in STAGES:
        run = torch_peers.denoiser_blocks((408, 648, 1728)[STAGES[name]])
    else:
        network = torch_peers.causal_encoder() if name == "encode" else torch_peers.tiny_decoder()
        x = torch.randn(1, 3, 1, 320, 512) if name == "encode" else torch.randn(7, 16, *LATENT)
        run = lambda: network(x)  # noqa: E731

    def measured():
        with torch.inference_mode():
            run()

    return measured, None


def measure(name, peer):
    """One line of JSON: median seconds and the process's peak memory in GiB."""
    if peer:
        run, flops = torch_work(name)
    else:
        run, flops = denoiser(STAGES[name]) if name in STAGES else {"encode": encode, "decode": decode}[name]()
    run()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": statistics.median(seconds), "peak": peak, "flops": flops}))


def child(name, *flags):
    """The measurement in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, *flags], capture_output=True, text=True, timeout=3600
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)} (default: all)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return measure(options.child, options.torch)
    if unknown := set(options.work) - set(WORK):
        parser.error(f"unknown work {', '.join(sorted(unknown))}; expected {', '.join(WORK)}")
    peer = importlib.util.find_spec("torch") is not None
    print(
        f"{'work':<12}{'seconds':>9}{'GFLOP/s':>9}{'peak GiB':>10}" + (f"{'torch s':>9}{'GiB':>7}{'ratio':>7}" * peer)
    )
    for name in options.work or WORK:
        ours = child(name)
        line = f"{name:<12}{ours['seconds']:>9.2f}{ours['flops'] / ours['seconds'] / 1e9:>9.0f}{ours['peak']:>10.2f}"
        if peer:
            theirs = child(name, "--torch")
            ratio = ours["seconds"] / theirs["seconds"]
            line += f"{theirs['seconds']:>9.2f}{theirs['peak']:>7.2f}{ratio:>7.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
