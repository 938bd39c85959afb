"""Prompt to video with a bundle's graphs, step by step as its schedule says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BundleError
from .latents import Statistics
from .manifest import Bundle
from .noise import Noise, named_noise
from .picture import PictureMaker
from .sampler import Condition, Denoiser, Plan, sample
from .sessions import Sessions
from .text import rows, run_tower
from .tokens import Tokenizer
from .upscale import Upscaler
from .video import from_uint8, to_uint8


class Pipeline:
    """A bundle ready to make videos.

    Args:
        bundle: the folder.
        precision: "deployed" (what each graph is meant to run in, where the bundle has it) or "fp32".
        threads: of onnxruntime; 0: its own choice.
        opener: opens what stands in for a graph's session, such as an NPU's; default: onnxruntime's CPU provider.

    Raises:
        BundleError: for whatever is wrong with the bundle.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        precision: str = "deployed",
        threads: int = 0,
        opener: Callable[[str], Any] | None = None,
    ):
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        self.sessions = Sessions(self.bundle, precision, threads, opener)
        self.statistics = Statistics(self.bundle["latent"])
        self.plan = Plan.from_dict(self.bundle["sampling"], len(self.bundle["denoiser"]["stages"]))
        text = self.bundle["text"]
        self._tokenizers = [Tokenizer(self.bundle, entry) for entry in (text["t5"], *text["clip"])]
        picture, upscaler = (self.bundle.content.get(key) for key in ("picture", "upscaler"))
        size = (self.bundle["video"]["height"], self.bundle["video"]["width"])
        self.picture = None if picture is None else PictureMaker(self.sessions, picture, size)
        """Makes first frames, where the bundle can."""
        self.upscaler = None if upscaler is None else Upscaler(self.sessions, upscaler)
        """Enlarges frames, where the bundle can."""

    @property
    def units(self) -> int:
        """Latent frames of a video."""
        return self.bundle["latent"]["frames"]

    def noise(self, seed: int, sample_name: int | str) -> Noise:
        """The noise of one video of a seed, the same as in every other runtime."""
        sizes = [tuple(stage["clips"][-1][1:]) for stage in self.bundle["denoiser"]["stages"]]
        latent = self.bundle["latent"]
        return named_noise(seed, sample_name, self.units, sizes, latent["channels"], self.bundle["denoiser"]["gamma"])

    # ---- steps

    def encode_text(self, prompts: list[str]) -> list[Condition]:
        """What the denoiser reads of each prompt."""
        text = self.bundle["text"]
        with self.sessions.step("text"):
            return [self._condition(text, prompt) for prompt in prompts]

    def _condition(self, text: Mapping[str, Any], prompt: str) -> Condition:
        t5, *towers = zip((text["t5"], *text["clip"]), self._tokenizers, strict=True)
        entry, tokenizer = t5
        ids, mask = tokenizer(prompt)
        bias = np.where(mask > 0, 0, text["hidden"]).astype(np.float32)[None, None]
        embeddings = rows(self.bundle, entry["table"], ids)
        states = self.sessions.run(entry["graph"], {"embeddings": embeddings, "bias": bias})["states"]
        if text["adapter"]:
            states = self.sessions.run(text["adapter"], {"states": states})["text"]
        found = {entry["graph"]: run_tower(self.sessions, entry, tokenizer, prompt) for entry, tokenizer in towers}
        pooled = [found[entry["graph"]]["text_embeds"] for entry, _ in towers]
        return Condition(states, mask, np.concatenate(pooled, axis=1), found)

    def make_picture(self, prompt: str, condition: Condition, seed: int, sample_name: int | str) -> np.ndarray:
        """First frame uint8 [H, W, 3] of a prompt. Raises BundleError where the bundle has no networks for it."""
        if self.picture is None:
            raise BundleError(f"{self.bundle.folder} makes no first frames; give an image")
        text = self.picture.text(prompt, condition.towers)
        return self.picture.decode(self.picture.sample(text, seed, sample_name))

    def encode_first_frame(self, image: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Normalised latent [h, w, C] of a given first frame uint8 [H, W, 3]: a posterior sample."""
        name = self.bundle["codec"]["encoder"]
        with self.sessions.step("first_frame"):
            code = self.sessions.run(name, {"image": from_uint8(image)[None]})
        spread = np.exp(np.float32(0.5) * np.clip(code["logvar"], -30.0, 20.0))
        return self.statistics.normalise((code["mean"] + spread * noise)[0].astype(np.float32), 0)

    def latents(
        self,
        conditions: list[Condition],
        noise: Noise,
        *,
        plan: Plan | None = None,
        first: np.ndarray | None = None,
        units: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:
        """Normalised latents [U, h, w, C]. With guidance, ``conditions`` holds the negative prompt's first."""
        plan, units = plan or self.plan, self.units if units is None else units
        if len(conditions) != 1 + plan.guided:
            raise BundleError(f"{len(conditions)} conditions; expected {1 + plan.guided} for this plan")
        denoiser = Denoiser(self.sessions, conditions)
        with self.sessions.step("conditioning"):
            denoiser.prepare(plan, 0 if first is None else 1, units)
        with self.sessions.step("denoise"):
            return sample(denoiser, plan, noise, units, first, progress)

    def decode(self, latents: np.ndarray, *, upscale: bool = True) -> Iterator[np.ndarray]:
        """Video frames, uint8 [H, W, 3], as they are made; enlarged, where the bundle can, with ``upscale``."""
        codec = self.bundle["codec"]
        finish = self.upscaler if upscale and self.upscaler is not None else to_uint8
        with self.sessions.step("decode"):
            shapes = self.bundle.graph(codec["decoder"])["inputs"]
            state = {key: np.zeros(shape, np.float32) for key, shape in shapes.items() if key.startswith("state/")}
            for unit, latent in enumerate(latents):
                alone = codec["first_decoder"] if unit == 0 else None
                raw = self.statistics.denormalise(latent, unit)[None].astype(np.float32)
                inputs = {"latent": raw} if alone else {"latent": raw, **state}
                out = self.sessions.run(alone or codec["decoder"], inputs)
                state |= {key: out[next_key] for key in state if (next_key := f"next/{key[6:]}") in out}
                frames = sum(key.startswith("frame/") for key in out)
                for k in range(codec["drop_first"] if unit == 0 and not alone else 0, frames):
                    yield finish(out[f"frame/{k}"][0])

    def video(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        sample_name: int | str = 0,
        image: np.ndarray | None = None,
        plan: Plan | None = None,
        upscale: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:
        """uint8 [T, H, W, 3] for one prompt; ``image`` is a given first frame of the bundle's size (default: one that
        the bundle makes, if it has networks for that). ``upscale``: enlarge frames, where the bundle can."""
        plan, noise = plan or self.plan, self.noise(seed, sample_name)
        conditions = self.encode_text([negative_prompt, prompt] if plan.guided else [prompt])
        if image is None and self.picture is not None:
            image = self.make_picture(prompt, conditions[-1], seed, sample_name)
        first = None if image is None else self.encode_first_frame(image, noise.first)
        latents = self.latents(conditions, noise, plan=plan, first=first, progress=progress)
        return np.stack(list(self.decode(latents, upscale=upscale)))
