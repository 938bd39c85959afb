"""What a worker of ``nd-jax data precompute`` is told, and its networks: clips to latents, captions to features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.converters.component import load_component
from nd_jax.data.captions_file import Skipped
from nd_jax.data.latent_shards import BF16, Example
from nd_jax.data.timeline import read_picks
from nd_jax.data.video_folder import FolderOptions, survey_clip
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import definition as codec_definition
from nd_jax.models.causal_vae import posterior
from nd_jax.pixels import from_uint8
from nd_jax.stored_text import TextReader
from nd_jax.system import codec_folder, load_system
from nd_jax.text_workflow import shared_tokenizer
from nd_jax.training.mesh import MeshConfig, batch_entry, make_mesh


@dataclass(frozen=True)
class Job:
    """What every worker is told. All folders have to be reachable by that path on every worker."""

    folder: Path
    """Of clips."""
    out: Path
    codec: Path
    teacher: Path | None
    """System whose text features are wanted, if any."""
    options: FolderOptions
    batch: int = 8
    """Windows and prompts that are encoded at once."""
    text: Literal["denoiser", "encoder"] = "denoiser"
    """Text features as the denoiser's blocks read them, or as the encoders give them; they differ where the denoiser
    embeds text itself."""
    text_dtype: Literal["bfloat16", "float32"] = "bfloat16"


class Encoder:
    """A worker's networks: the codec, batches split over its devices, and the teacher's text encoders, split.

    Raises UserError for folders that do not hold them.
    """

    def __init__(self, job: Job):
        self.job, self.mesh = job, make_mesh(MeshConfig(fsdp=len(jax.local_devices())), jax.local_devices())
        whole, split = NamedSharding(self.mesh, P()), NamedSharding(self.mesh, P(batch_entry(self.mesh)))
        self.where = whole if job.batch % self.mesh.size else split
        config, params = load_component(codec_folder(job.codec), "video_vae", dtype="fp32")
        codec, self._codec = codec_definition(config), jax.device_put(params, whole)
        self._latents = jax.jit(lambda params, video: posterior(codec.bind(params).encode(video)).mean)
        self.text_length, self.embedded = None, False
        if job.teacher is not None:
            system = load_system(job.teacher, dtype=None)
            shared_tokenizer(system)
            self.text_length = system.video.text_length
            options = {"embedded": job.text == "denoiser"}
            self._text = TextReader(system.config, system.params, system.tokenizers, self.mesh, **options)
            self.embedded = self._text.embedded

    def clips(self, rows: Sequence[dict[str, Any]], skipped: list[Skipped]) -> Iterator[Example]:
        """Every window of every clip; what cannot be used goes to ``skipped``."""
        job, contents = self.job, {}
        pending: list[tuple[Example, np.ndarray]] = []
        for row in rows:
            name = row["file"]
            try:
                clip = survey_clip(job.folder, name, job.options, row["captions"], contents)
                videos = read_picks(job.folder / name, clip.picks, clip.size, job.options.limits)
            except UserError as error:
                skipped.append(Skipped(name, str(error).removeprefix(f"video: {job.folder / name} ")))
                continue
            contents[clip.sha256] = name
            pending += [
                (Example(name, clip.captions, start=start), video)
                for start, video in zip(clip.starts, videos, strict=True)
            ]
            while len(pending) >= job.batch:
                yield from self._encode(pending[: job.batch], skipped)
                del pending[: job.batch]
        if pending:
            yield from self._encode(pending, skipped)

    def _encode(self, pending: list[tuple[Example, np.ndarray]], skipped: list[Skipped]) -> Iterator[Example]:
        videos = np.stack([video for _, video in pending])
        missing = self.job.batch - len(videos)  # the last batch keeps its shape, so that nothing compiles again
        videos = from_uint8(np.pad(videos, ((0, missing), *((0, 0),) * 4), mode="edge"))
        latents = np.asarray(self._latents(self._codec, jax.device_put(jnp.asarray(videos), self.where)))
        for (example, _), each in zip(pending, latents, strict=False):
            if not np.isfinite(each.astype(BF16).astype(np.float32)).all():
                skipped.append(Skipped(example.name, "its latents are not finite in bfloat16"))
                continue
            yield self._with_text(dataclasses.replace(example, latents=each))

    def prompts(self, texts: Sequence[str]) -> Iterator[Example]:
        """A record for every prompt, without latents."""
        for start in range(0, len(texts), self.job.batch):
            some = texts[start : start + self.job.batch]
            for text, each in zip(some, self._text(some, self.job.batch), strict=True):
                yield dataclasses.replace(Example("", (text,)), **_text_fields([each]))

    def _with_text(self, example: Example) -> Example:
        if self.text_length is None:
            return example
        return dataclasses.replace(example, **_text_fields(self._text(example.captions, self.job.batch)))


def _text_fields(read: Sequence[tuple]) -> dict[str, tuple]:
    """What ``TextReader`` gives, as fields of ``Example``."""
    ids, features, pooled = zip(*read, strict=True)
    return {"ids": ids, "features": features, "pooled": () if pooled[0] is None else pooled}
