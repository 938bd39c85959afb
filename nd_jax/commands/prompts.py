"""``nd-jax data prompts`` and ``nd-jax data features``: what text encoders are distilled on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, console, progress_bar, say, tell_skipped, warn
from nd_jax.errors import UserError
from nd_jax.outputs import check_new, new_folder


def data_prompts(
    files: Positional[tuple[Path, ...]],
    out: Path,
    packages: int = 0,
    seed: int = 0,
    package_folder: Path | None = None,
    held_out: float = 0.01,
    overwrite: bool = False,
) -> None:
    """Make a corpus of prompts to distil text encoders on.

    Prompts that evaluation uses (VBench's) are refused, and those whose words came before are left out. Lines that
    cannot be used are listed with reasons in OUT/skipped.jsonl.

    Args:
        files: .txt files with one prompt a line, and .jsonl files with {"prompt": ...} or {"caption": ...} a line.
        out: folder for the corpus.
        packages: how many prompts to compose of the lists in the packages clip-interrogator and open-clip-torch.
        seed: of the composed prompts.
        package_folder: where these packages are, if not installed here.
        held_out: share of the prompts that is held out; which, depends on their words only.
        overwrite: replace an existing corpus.
    """
    check_at_least(0, packages=packages, seed=seed)
    if not files and not packages:
        raise UserError("data prompts: expected FILE ... (.txt or .jsonl), --packages N, or both")
    if package_folder is not None and not packages:
        raise UserError("data prompts: --package-folder is for composed prompts; say how many with --packages N")
    check_new(out, overwrite=overwrite)
    from nd_jax.data import prompts
    from nd_jax.data.captions_file import SKIPPED, write_skipped
    from nd_jax.data.prompt_files import PromptFile
    from nd_jax.data.prompt_packages import PackagePrompts
    from nd_jax.datasets import tfds_quiet

    corpora: list[prompts.Corpus] = [PromptFile(path) for path in files]
    if packages:
        corpora.append(PackagePrompts(packages, seed=seed, folder=package_folder))
    with new_folder(out, overwrite=overwrite) as part, console.status("reading and writing prompts"), tfds_quiet():
        record, skipped = prompts.prepare(corpora, part, held_out=held_out)
        write_skipped(part, skipped)
    _tell(record)
    tell_skipped(skipped, "lines", out / SKIPPED)
    print(out)


def _tell(record: dict[str, Any]) -> None:
    """What became of the prompts."""
    from nd_jax.text_student import FEWEST

    counts = record["counts"]
    say(f"{counts['train']} prompts to train on, {counts['held_out']} held out")
    if record["duplicates"]:
        say(f"left out: {record['duplicates']} whose words came before")
    if record["refused"]:
        warn(f"left out: {record['refused']} that evaluation uses")
    if counts["held_out"] < FEWEST:
        warn(f"the report on a student wants at least {FEWEST} held-out prompts; a larger --held-out gives more")


def data_features(
    system: Positional[Path],
    out: Path,
    prompts: tuple[Path, ...] = (),
    captions: int = 0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch: int = 64,
    overwrite: bool = False,
) -> None:
    """Compute what a system's denoiser reads of prompts, once, so that distillation need not run its T5.

    Takes the training prompts only. One in fifty is the empty prompt, which guidance reads; two fifths of the shapes
    captions follow no template. Both are what live distillation does by default.

    Args:
        system: system folder of the teacher.
        out: folder for the features; it takes tokens x channels x 4 bytes, or 2.
        prompts: folders of `nd-jax data prompts`.
        captions: captions of the shapes worlds, as well.
        seed: of these captions.
        dtype: of the features on disk.
        batch: prompts at a time.
        overwrite: replace an existing folder.
    """
    check_at_least(0, captions=captions, seed=seed)
    check_at_least(1, batch=batch)
    if not prompts and not captions:
        raise UserError("data features: expected --prompts FOLDER ..., --captions N, or both")
    check_new(out, overwrite=overwrite)
    from nd_jax.recipes.preset import TextDistillRun
    from nd_jax.recipes.text_distillation import TextDistillConfig
    from nd_jax.system import load_system
    from nd_jax.text_workflow import encode_prompts, prompt_source
    from nd_jax.training.loop import LoopConfig

    run = TextDistillRun(recipe=TextDistillConfig(captions=captions), loop=LoopConfig(seed=seed))
    source = prompt_source(run, prompts)
    teacher = load_system(system, dtype=None)
    with progress_bar("encoding prompts", len(source)) as progress:
        encode_prompts(teacher, source, out, batch=batch, dtype=dtype, overwrite=overwrite, progress=progress)
    say(f"{len(source)} prompts")
    print(out)
