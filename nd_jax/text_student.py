"""Text-encoder distillation from folder to folder: a teacher's text encoder becomes a smaller one, and is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.checked_files import shown
from nd_jax.converters.component import open_component
from nd_jax.converters.folders import Folder, load_folder
from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.system import ADAPTER, T5
from nd_jax.outputs import check_new, check_new_file, new_file
from nd_jax.recipes.preset import Preset, TextDistillRun
from nd_jax.system import load_system, save_system
from nd_jax.text_report import text_report
from nd_jax.text_workflow import prompt_source, shared_tokenizer, train_text_student
from nd_jax.training.cluster import once
from nd_jax.training.loop import Outcome
from nd_jax.weights import shipped_folder

FIGURES = "text.json"
FEWEST = 3
"""Held-out prompts that a report needs: with two, every prompt's nearest other one is the same."""
MOST = 512
"""Held-out prompts that a report takes."""
KINDS = {"t5": T5, "context_adapter": ADAPTER}


def held_out_prompts(run: TextDistillRun, folders: Sequence[str | Path] = (), *, most: int = MOST) -> list[str]:
    """Different held-out prompts, at most ``most``, spread evenly over those of the folders and the run's captions.

    Raises UserError for fewer than ``FEWEST``.
    """
    source = prompt_source(run, folders, split="held_out")
    chosen = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
    texts = list(dict.fromkeys(source[int(index)]["caption"] for index in chosen))
    if len(texts) < FEWEST:
        raise UserError(
            f"text report: {len(texts)} held-out prompts, expected at least {FEWEST}; make the corpus again with a "
            "larger --held-out, or name another one with --held-out FOLDER"
        )
    return texts


def start_networks(path: str | Path, run: TextDistillRun, *, mode: str) -> dict[str, Params]:
    """Parameters (float32) that a student begins with, by the names ``T5`` and ``ADAPTER``: one of them, or both.

    ``path`` is a system folder, whose T5 and context adapter are taken (of two adapters that of ``mode``), or the
    folder of one such network. Raises UserError for a network that is not shaped as the run's.
    """
    folder = load_folder(shipped_folder(path))
    found = {}
    for role, name in _names(folder, mode).items():
        with open_component(folder.components[name], folder.kinds[name]) as component:
            _check_same(component.config, run.encoder if role == T5 else run.adapter, role, folder.components[name])
            found[role] = component.load(dtype="fp32")
    return found


def _names(folder: Folder, mode: str) -> dict[str, str]:
    """Which component is which."""
    if folder.single:
        ((name, kind),) = folder.kinds.items()
        names = {KINDS[kind]: name} if kind in KINDS else {}
    else:
        names = {T5: T5} if folder.has(T5) else {}
        if folder.has(ADAPTER):
            both = folder.has(ADAPTER, "hybrid") and folder.has(ADAPTER, "monolithic")
            names[ADAPTER] = folder.name_of(ADAPTER, mode if both else None)
    if not names:
        told = ", ".join(f"{name} ({kind})" for name, kind in folder.kinds.items())
        raise UserError(
            f"{folder.path} holds {told}; expected a T5 or a context adapter to start from, or a system with them"
        )
    return names


def _check_same(found: Any, wanted: Any, role: str, where: Path) -> None:
    """Raises UserError naming the fields in which the configurations of a network differ, and their options."""
    names = [field.name for field in dataclasses.fields(wanted)]
    other = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    if other:
        part = "encoder" if role == T5 else "adapter"
        told = ", ".join(f"{name} {shown(getattr(found, name))} (the run: {getattr(wanted, name)!r})" for name in other)
        options = " ".join(f"--{part}.{name.replace('_', '-')}" for name in other)
        raise UserError(
            f"{where} has {told}; expected the network of the run: set {options}, or start from another folder, such "
            "as that of the one network to begin with"
        )


def distil_text(
    preset: Preset,
    name: str,
    run: TextDistillRun,
    out: Path,
    *,
    teacher: str | Path,
    prompts: Sequence[Path] = (),
    features: Path | None = None,
    held_out: Sequence[Path] = (),
    start: Path | None = None,
    quiet: bool = False,
) -> tuple[Outcome, dict[str, Any] | None]:
    """From folders to folders: train the run's student, put it into the teacher's system, and compare both.

    ``out`` receives ``system``, with the teacher's tokenizers, and ``text.json``, the report on held-out prompts: those
    of the folders ``held_out`` (default: ``prompts``), and of the shapes worlds if the run takes captions. Trains on
    ``features`` (a folder of ``encode_prompts``) if there are any, else on ``prompts`` and captions.
    Returns how it ended and, if it was not interrupted, the report. Raises UserError, before anything is trained, for
    what does not fit.
    """
    out = Path(out)
    check_new(out / "system", overwrite=True)
    check_new_file(out / FIGURES, overwrite=True)
    texts = held_out_prompts(run, held_out or prompts)
    system = load_system(teacher, dtype=None)
    shared_tokenizer(system)
    source = prompt_source(run, prompts) if features is None else None
    given = None if start is None else start_networks(start, run, mode=system.mode)
    tokenizers = dict(load_folder(system.folder).tokenizers)
    if features is not None:
        del system.params[T5]  # the targets are there: it would only fill memory
    outcome, student = train_text_student(
        f"{preset.name}/{name}", run, out, teacher=system, prompts=source, features=features, start=given, quiet=quiet
    )
    if student is None:
        return outcome, None
    once(lambda: save_system(out / "system", student, tokenizers, dtype=None, overwrite=True), "writing the system")
    if features is not None:
        system = load_system(teacher, dtype=None)
    report = text_report(system, student, texts)

    def write() -> None:
        with new_file(out / FIGURES, overwrite=True) as part:
            part.write_text(json.dumps(report, indent=2) + "\n")

    once(write, "writing the report")
    return outcome, report
