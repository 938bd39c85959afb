"""What the judge read, video by video: enough to compute every figure again, and to compare systems without
generating again. Kept as JSON; a file of somebody else's is checked before anything is made of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int, UInt8

from nd_jax.checked_files import read_json, shown
from nd_jax.data import judge
from nd_jax.data.world import ATTRIBUTES, World
from nd_jax.errors import UserError
from nd_jax.outputs import new_file
from nd_jax.protocol.definition import CONTROL_SPLIT, SPLITS, Protocol, prompt_list

Readings = TypeVar("Readings", bound=tuple)

FILE = "readings.json"
FORMAT = 1
LIMIT = 1 << 26
"""Bytes of a readings file; the full protocol takes less than one per cent of it for each system."""


class Measured(NamedTuple):
    """Readings of many clips; leading axes are [n] (one clip per prompt) or [seeds, n]."""

    labels: Int[np.ndarray, "... objects 5"]
    """-1: not readable."""
    displacement: Float[np.ndarray, "... objects 2"]
    """(down, right) in pixels over the world's full length."""
    flicker: Float[np.ndarray, "... objects"]
    """Grey levels of 255, in the object's part of the frame; see ``flicker``."""

    @property
    def travel(self) -> Float[np.ndarray, "... objects"]:
        """Length of the displacement, pixels."""
        return np.linalg.norm(self.displacement, axis=-1)

    @property
    def readable(self) -> np.ndarray:
        """Whether there was an object to read a motion from."""
        return self.labels[..., 3] >= 0


def flicker(video: UInt8[np.ndarray, "t h w 3"], world: World) -> Float[np.ndarray, " objects"]:
    """Mean absolute difference of neighbouring frames over all pixels of each object's part of the frame, in 8-bit
    levels: what VBench's temporal flickering is 255 minus (arXiv 2311.17982). Where nothing should move all of it is
    flicker."""
    change = np.abs(np.diff(video.astype(np.int16), axis=0)).mean(axis=(0, 1, 3))
    return change.reshape(world.objects, world.region_width).mean(1)


def measure(video: UInt8[np.ndarray, "t h w 3"], world: World) -> Measured:
    """Read one clip of at least two frames."""
    reading = judge.read(video, world)
    return Measured(reading.labels, np.round(reading.displacement, 3), np.round(flicker(video, world), 4))


def stack(parts: Iterable[Readings]) -> Readings:
    """Named tuples of arrays as one, with a new leading axis. There has to be one at least."""
    parts = list(parts)
    return type(parts[0])(*map(np.stack, zip(*parts, strict=True)))


@dataclass(frozen=True)
class SplitReadings:
    """One system on one split."""

    made: Measured
    """[seeds, n, ...] The system's videos."""
    truth: Measured
    """[n, ...] Drawn clips with the same labels."""
    codec: Measured
    """[n, ...] The codec's reconstructions of those clips."""
    cut: int
    """Prompts that were longer than the text encoders read."""


@dataclass(frozen=True)
class ProtocolResult:
    """One system under a protocol."""

    protocol: Protocol
    splits: dict[str, SplitReadings]
    controls: dict[str, Measured]
    """[seeds, n, ...] Videos that know nothing of the prompts of ``CONTROL_SPLIT``."""
    about: dict[str, Any]
    """JSON-ready facts: sampling steps and guidance, frames, parameters of the denoiser, seconds per video."""
    samples: dict[str, list[UInt8[np.ndarray, "t h w 3"]]] = field(default_factory=dict, repr=False, compare=False)
    """The first videos of each split's first seed, for the report; not kept on disk."""


def write_readings(path: Path, results: Mapping[str, ProtocolResult]) -> Path:
    """One file for all systems."""
    content = {"format": FORMAT, "systems": {name: _as_json(result) for name, result in results.items()}}
    with new_file(path, overwrite=True) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
    return path


def _as_json(result: ProtocolResult) -> dict[str, Any]:
    def plain(measured: Measured) -> dict[str, Any]:
        return {name: array.tolist() for name, array in measured._asdict().items()}

    splits = {}
    for name, readings in result.splits.items():
        prompts = prompt_list(result.protocol, name)
        parts = {part: plain(getattr(readings, part)) for part in ("made", "truth", "codec")}
        asked = {"captions": list(prompts.captions), "labels": prompts.labels.tolist()}
        splits[name] = {**asked, **parts, "cut": readings.cut}
    return {
        "protocol": dataclasses.asdict(result.protocol),
        "about": result.about,
        "splits": splits,
        "controls": {name: plain(measured) for name, measured in result.controls.items()},
    }


def read_readings(path: Path) -> dict[str, ProtocolResult]:
    """The systems of a file of ``write_readings``.

    Raises UserError, naming the place, for anything that such a file does not hold.
    """
    content = read_json(path, LIMIT, "readings file")
    try:
        if content.get("format") != FORMAT:
            raise ValueError(f"format {shown(content.get('format'))}, expected {FORMAT}")
        systems = _object(content.get("systems"), "systems")
        return {name: _system(_object(each, "a system")) for name, each in systems.items()}
    except (KeyError, ValueError, TypeError, UserError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} does not hold readings ({reason}); make it again with nd-jax evaluate") from None


def _object(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{what}: {shown(content)}, expected an object")
    return content


def _system(content: dict[str, Any]) -> ProtocolResult:
    given = _object(content["protocol"], "protocol")
    seeds = given.get("sampling_seeds")
    protocol = Protocol(**{**given, "sampling_seeds": tuple(seeds) if isinstance(seeds, list) else seeds})
    splits = {}
    for name, each in _object(content["splits"], "splits").items():
        if name not in SPLITS:
            raise ValueError(f"split {shown(name)}, expected one of {', '.join(SPLITS)}")
        splits[name] = _split(_object(each, name), protocol, name)
    controls, seeds = content["controls"], len(protocol.sampling_seeds)
    objects = SPLITS[CONTROL_SPLIT].world.objects
    if not isinstance(controls, dict):
        raise ValueError(f"controls: {shown(controls)}, expected an object")
    controls = {
        name: _measured(each, f"controls, {shown(name)}", (seeds, protocol.prompts, objects))
        for name, each in controls.items()
    }
    about = _object(content["about"], "about")
    for name in ("denoiser_parameters", "seconds_per_video"):
        if type(about.get(name)) not in (int, float) or not math.isfinite(about[name]):
            raise ValueError(f"about: {name} is {shown(about.get(name))}, expected a number")
    return ProtocolResult(protocol, splits, controls, about)


def _split(content: dict[str, Any], protocol: Protocol, name: str) -> SplitReadings:
    prompts = prompt_list(protocol, name)
    if content["captions"] != list(prompts.captions) or content["labels"] != prompts.labels.tolist():
        raise ValueError(f"{name}: its prompts are not those of this version's shapes world")
    size = prompts.labels.shape[:2]
    if type(content["cut"]) is not int or not 0 <= content["cut"] <= size[0]:
        raise ValueError(f"{name}: cut is {shown(content['cut'])}, expected a number of prompts")
    made = _measured(content["made"], f"{name}, made", (len(protocol.sampling_seeds), *size))
    truth, codec = (_measured(content[part], f"{name}, {part}", size) for part in ("truth", "codec"))
    return SplitReadings(made, truth, codec, content["cut"])


def _measured(content: Any, where: str, size: Sequence[int]) -> Measured:
    content, arrays = _object(content, where), []
    shapes = {"labels": (*size, len(ATTRIBUTES)), "displacement": (*size, 2), "flicker": tuple(size)}
    for name, shape in shapes.items():
        array = np.array(content[name])
        kinds = "i" if name == "labels" else "if"
        if array.shape != shape or array.dtype.kind not in kinds or not np.isfinite(array).all():
            raise ValueError(f"{where}: {name} are not {'whole ' if kinds == 'i' else ''}numbers of shape {shape}")
        arrays.append(array.astype(np.int32 if kinds == "i" else np.float64))
    return Measured(*arrays)
