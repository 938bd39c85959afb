"""Hybrid generation at full size with random weights: time and peak memory of every part.

    python tests/benchmarks/bench_hybrid.py [--frames 49] [--dtype bf16] [--out FOLDER] [--peers]

49 frames, 320x512 denoised and 640x1024 written, all networks of the official release with QuickSRNet medium and the
safety checker, none of their files: parameters are drawn when a network is wanted and dropped with it. With
``--peers`` the UNet and the image decoder of diffusers run once beside ours (the `peers` extra). Meant for a 24 GiB CPU
machine with two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.converters.dtypes import PARAMETER
from nd_jax.data.tokenizers import Tokens
from nd_jax.hybrid import HybridPipeline
from nd_jax.meter import Meter
from nd_jax.models import causal_vae, clip, context_adapter, image_vae, mmdit, quicksrnet, safety_checker, t5, unet
from nd_jax.models.functional import Params, count_parameters
from nd_jax.recipes.preset import VideoConfig
from nd_jax.training.paths import map_named

NETWORKS: dict[str, tuple[Any, Any]] = {
    "text_encoder_3": (t5.T5Config(), t5),
    "context_adapter": (context_adapter.ContextAdapterConfig(), context_adapter),
    "text_encoder": (clip.clip_l(), clip),
    "text_encoder_2": (clip.clip_bigg(), clip),
    "ssd_1b_text_encoder": (clip.CLIPTextConfig(with_projection=False), clip),
    "ssd_1b_text_encoder_2": (clip.clip_bigg(), clip),
    "ssd_1b_unet": (unet.UNetConfig(), unet),
    "ssd_1b_vae": (image_vae.ImageVAEConfig(), image_vae),
    "causal_video_vae": (causal_vae.AsymmetricVAEConfig(), causal_vae),
    "diffusion_transformer_320p": (mmdit.MMDiTConfig(num_layers=18), mmdit),
    "super_resolution": (quicksrnet.quicksrnet("medium"), quicksrnet),
    "safety_checker": (safety_checker.SafetyCheckerConfig(), safety_checker),
}


class RandomParts:
    """``nd_jax.parts.Parts`` out of nothing. Weights repeat one block of random numbers, which is quick to make."""

    def __init__(self, dtype: str):
        self.dtype = PARAMETER[dtype]
        block = np.random.Generator(np.random.Philox(0)).standard_normal(1 << 22, np.float32)
        self._block = block

    def has(self, name: str) -> bool:
        return name in NETWORKS

    def config(self, name: str) -> Any:
        return NETWORKS[name][0]

    def abstract(self, name: str, parts: Sequence[str] | None = None) -> Params:
        config, module = NETWORKS[name]
        whole = module.definition(config).abstract()
        return whole if parts is None else {part: whole[part] for part in parts}

    def load(self, name: str, parts: Sequence[str] | None = None) -> Params:
        def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if path.endswith("scale"):
                return jnp.ones(leaf.shape, self.dtype)
            if path.endswith("concept_embeds_weights"):
                return jnp.full(leaf.shape, 2, self.dtype)  # so that the checker never objects
            fan_in = np.prod(leaf.shape[-4:-1] if path.endswith("kernel") else leaf.shape[-1:])
            values = np.empty(leaf.size, self.dtype)
            for start in range(0, leaf.size, self._block.size):
                piece = values[start : start + self._block.size]
                piece[:] = self._block[: len(piece)] * np.float32(max(1, fan_in) ** -0.5)
            return jax.device_put(values.reshape(leaf.shape))

        return map_named(draw, self.abstract(name, parts))

    def tokenizer(self, name: str, length: int) -> Any:
        def read(texts: Sequence[str]) -> Tokens:
            ids = np.full((len(texts), length), 1, np.int32)
            ids[:, :12] = np.arange(100, 112)
            mask = np.zeros_like(ids)
            mask[:, :12] = 1
            return Tokens(ids, mask, [])

        return read


def peers(meter: Meter, height: int, width: int) -> None:
    """The UNet once and the image decoder once, in PyTorch, at the sizes of the first frame."""
    import diffusers
    import torch

    with torch.no_grad(), meter.part("PyTorch: UNet, one step"):
        network = diffusers.UNet2DConditionModel.from_config(unet.UNetConfig().to_dict()).to(torch.bfloat16).eval()
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        added = {name: value.to(torch.bfloat16) for name, value in added.items()}
        sample = torch.randn(1, 4, height // 4, width // 4, dtype=torch.bfloat16)
        network(sample, 999, torch.zeros(1, 77, 2048, dtype=torch.bfloat16), added_cond_kwargs=added)
        del network
    with torch.no_grad(), meter.part("PyTorch: image decoder"):
        network = diffusers.AutoencoderKL.from_config(image_vae.ImageVAEConfig().to_dict()).eval()
        network.decode(torch.randn(1, 4, height // 4, width // 4))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--frames", type=int, default=49)
    options.add_argument("--height", type=int, default=320)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--dtype", choices=list(PARAMETER), default="bf16", help="of parameters in memory")
    options.add_argument("--compute", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--out", type=Path, default=None, help="folder for the video")
    options.add_argument("--peers", action="store_true")
    given = options.parse_args()
    video = VideoConfig(height=given.height, width=given.width, frames=given.frames)
    parts = RandomParts(given.dtype)
    counts = {name: count_parameters(parts.abstract(name)) for name in NETWORKS}
    print(f"{sum(counts.values()):,} parameters in {len(counts)} networks, kept as {given.dtype}")
    meter = Meter(tell=lambda part: print(part, flush=True))
    with meter.part("definitions"):
        line = HybridPipeline(parts, video, compute=jnp.dtype(given.compute), meter=meter)
    with tempfile.TemporaryDirectory() as scratch:
        out = given.out or Path(scratch)
        (made,) = line.generate(["a red circle moves up"], [out / "video.mp4"], overwrite=True)
        print(made.file, f"{made.file.stat().st_size:,} bytes")
    if given.peers:
        peers(meter, given.height, given.width)
    print(meter.table())


if __name__ == "__main__":
    main()
