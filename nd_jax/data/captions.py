"""Captions for scenes of the shapes world: templates, synonyms and two-object sentences.

Held-out templates arrange the words of the others anew, so that a text encoder has something to generalise to.
Nothing ever parses a caption: the attributes of a drawn clip are known.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from nd_jax.data.world import ATTRIBUTES, sample_labels, world_named

WORDS = {
    "red": ("red", "scarlet", "crimson"),
    "green": ("green", "lime", "leaf green"),
    "blue": ("blue", "cobalt", "royal blue"),
    "yellow": ("yellow", "golden", "lemon"),
    "purple": ("purple", "violet", "magenta"),
    "cyan": ("cyan", "turquoise", "teal"),
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "cross": ("cross", "plus", "plus sign"),
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "middling", "mid sized"),
    "large": ("large", "big", "huge"),
    "black": ("black", "jet black", "pitch black"),
    "grey": ("grey", "gray", "ash grey"),
    "white": ("white", "snow white", "chalk white"),
    "brown": ("brown", "chocolate", "dark brown"),
    "navy": ("navy", "dark blue", "midnight blue"),
}
STILL = {
    "finite": ("stays still", "stands still", "does not move", "rests"),
    "participle": ("staying still", "standing still", "not moving", "resting"),
}
VERBS = {
    "finite": ("moves", "drifts", "glides", "slides", "travels"),
    "participle": ("moving", "drifting", "gliding", "sliding", "travelling"),
}
WHERE = {
    "right": ("right", "to the right", "rightwards"),
    "left": ("left", "to the left", "leftwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
    "up right": ("up and right", "to the upper right", "diagonally up right"),
    "up left": ("up and left", "to the upper left", "diagonally up left"),
    "down right": ("down and right", "to the lower right", "diagonally down right"),
    "down left": ("down and left", "to the lower left", "diagonally down left"),
}
TEMPLATES = (
    "a {size} {colour} {shape} {moves} on a {background} background",
    "a {size} {colour} {shape} {moving} over a {background} background",
    "on a {background} background a {size} {colour} {shape} {moves}",
    "{background} background, {size} {colour} {shape} {moving}",
    "the {shape} is {colour} and {size} , it {moves} on {background}",
    "a video of a {size} {colour} {shape} {moving}, the background is {background}",
    "the background is {background} and a {size} {colour} {shape} {moves}",
    "{size} {colour} {shape} {moving} in front of {background}",
    "a {colour} {shape}, quite {size}, {moves} against {background}",
    "there is a {size} {shape} in {colour} {moving} on {background}",
    "we see a {size} {colour} {shape} that {moves}, all else is {background}",
    "short clip: {size} {colour} {shape}, {moving}, {background} behind",
    "a {background} scene with a {size} {colour} {shape} {moving}",
    "one {size} {shape} coloured {colour} {moves} before a {background} wall",
    "against a plain {background} background a {size} {colour} {shape} {moves}",
    "a {size} {shape} painted {colour} {moves}, {background} backdrop",
    "{moving}: a {size} {colour} {shape} on a {background} backdrop",
    "watch the {size} {colour} {shape} {moving} over {background}",
    "the {size} {colour} {shape} {moves} while the background is {background}",
    "an animation of a {size} {colour} {shape} {moving} over {background}",
    "in this clip a {size} {colour} {shape} {moves} over a {background} backdrop",
    "{colour} {shape}, {size}, {moving}, {background} background",
    "a {shape} that is {size} and {colour} {moves} on {background}",
    "{size} {shape}, {colour}, {moving} against a {background} backdrop",
)
HELD_OUT_TEMPLATES = (
    "clip of a {colour} {shape} that is {size} and {moves} on {background}",
    "a {background} backdrop behind a {size} {colour} {shape} {moving}",
    "over a {background} wall the {size} {colour} {shape} {moves}",
    "we watch one {shape}, {size} and {colour}, {moving} in front of {background}",
    "{background} backdrop and a {size} {shape} in {colour} that {moves}",
    "{colour} and {size}, the {shape} {moves} before {background}",
)
PAIRS = (
    "on the left a {0}, on the right a {1}, {background} background",
    "a {0} on the left and a {1} on the right over {background}",
    "{background} background, left: {0}, right: {1}",
    "on {background}, a {0} at the left side and a {1} at the right side",
    "two shapes on a {background} backdrop: at left a {0}, at right a {1}",
    "the left half shows a {0} and the right half a {1}, all else is {background}",
    "a video of a {0} beside a {1}, the background is {background}",
    "on the right a {1}, on the left a {0}, the background is {background}",
)
HELD_OUT_PAIRS = (
    "at the right side a {1} and at the left side a {0} over {background}",
    "{background} backdrop, a {0} at the left half, a {1} at the right half",
)


def _motion(motion: str, form: str, pick) -> str:
    return pick(STILL[form]) if motion == "still" else f"{pick(VERBS[form])} {pick(WHERE[motion])}"


def _slots(row, pick) -> dict[str, str]:
    """The words for one object. ``pick`` chooses one of a tuple of synonyms."""
    names = {name: values[index] for (name, values), index in zip(ATTRIBUTES.items(), row, strict=True)}
    slots = {name: pick(WORDS[value]) for name, value in names.items() if name != "motion"}
    slots["moves"] = _motion(names["motion"], "finite", pick)
    slots["moving"] = _motion(names["motion"], "participle", pick)
    return slots


def templates(objects: int, *, held_out: bool) -> tuple[str, ...]:
    """The templates for one or two objects that training uses, or those it never sees."""
    return {(1, False): TEMPLATES, (1, True): HELD_OUT_TEMPLATES, (2, False): PAIRS, (2, True): HELD_OUT_PAIRS}[
        objects, held_out
    ]


def fill(template: str, labels: Int[np.ndarray, "objects 5"], pick) -> str:
    """One template with the labels' words. ``pick`` chooses one of a tuple of synonyms."""
    first, *rest = (_slots(row, pick) for row in np.asarray(labels).tolist())
    if not rest:
        return template.format(**first).replace(" ,", ",")
    objects = [f"{slot['size']} {slot['colour']} {slot['shape']} {slot['moving']}" for slot in (first, *rest)]
    return template.format(*objects, background=first["background"])


def caption(labels: Int[np.ndarray, "objects 5"], rng: np.random.Generator, *, held_out: bool = False) -> str:
    """A random caption that names every attribute of every object."""

    def pick(options):
        return options[int(rng.integers(len(options)))]

    return fill(pick(templates(len(labels), held_out=held_out)), labels, pick)


OBJECTS = (
    "{size} {colour} {shape}",
    "{colour} {size} {shape}",
    "{shape}, {size} and {colour}",
    "{size} {shape} in {colour}",
)
MOVES = ("{moving}", "{moves}", "that {moves}", "it {moves}")
GROUNDS = ("{background}", "on {background}", "over {background}", "{background} background", "behind it {background}")
PLACES = ("{place}: {what}", "on the {place} {what}", "{what} on the {place}", "{what} at the {place} side")
JOINTS = (" ", ", ", " and ", " with ", ", the ", " , a ")
OPENINGS = ("", "", "here ", "a clip: ", "now we see ", "this shows a ", "one short video of a ", "look, there ")


def loose_caption(labels: Int[np.ndarray, "objects 5"], rng: np.random.Generator) -> str:
    """All attributes in telegram style: phrases in any order, joined anyhow. No template that evaluation uses.

    For text encoders, so that they read words and not places in a sentence.
    """

    def pick(options):
        return options[int(rng.integers(len(options)))]

    phrases, slots = [], {}
    for place, row in zip(("left", "right"), np.asarray(labels).tolist(), strict=False):
        slots = _slots(row, pick)
        what = [pick(OBJECTS), pick(MOVES)]
        phrase = pick(JOINTS).join(what[index] for index in rng.permutation(2)).format(**slots)
        phrases.append(phrase if len(labels) == 1 else pick(PLACES).format(place=place, what=phrase))
    phrases.append(pick(GROUNDS).format(**slots))
    ordered = [phrases[index] for index in rng.permutation(len(phrases))]
    return pick(OPENINGS) + pick(JOINTS).join(ordered).replace(" ,", ",")


def plain_caption(labels: Int[np.ndarray, "objects 5"]) -> str:
    """The first template in its plainest words: the same caption for the same labels, always."""
    return fill(templates(len(labels), held_out=False)[0], labels, lambda options: options[0])


def corpus(*, count: int = 4000, seed: int = 0) -> list[str]:
    """Captions to train tokenizers on: both kinds of world, training templates and seen combinations only."""
    lines = []
    for name in ("64x64", "two_objects"):
        rng = np.random.Generator(np.random.Philox([seed, world_named(name).objects]))
        lines += [caption(row, rng) for row in sample_labels(world_named(name), count, held_out=False, seed=seed)]
    return lines
