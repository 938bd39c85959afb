"""The ``nd-jax`` command: verbs, their help, one-line errors and exit codes.

Exit codes: 0 done, 1 a check failed (``verify``), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from nd_jax.errors import UserError

# verb (and sub-verb) -> module:function. Modules are imported only when their verb is used: jax takes a second to load.
VERBS = {
    "demo": "nd_jax.demo:demo",
    "data prepare": "nd_jax.commands.data:data_prepare",
    "data videos": "nd_jax.commands.videos:data_videos",
    "data latents": "nd_jax.commands.data:data_latents",
    "data precompute": "nd_jax.commands.precompute:data_precompute",
    "data reconstruct": "nd_jax.commands.videos:data_reconstruct",
    "data prompts": "nd_jax.commands.prompts:data_prompts",
    "data features": "nd_jax.commands.prompts:data_features",
    "train": "nd_jax.commands.train:train",
    "plan": "nd_jax.commands.plan:plan",
    "prune importance": "nd_jax.commands.prune:prune_importance",
    "prune apply": "nd_jax.commands.prune:prune_apply",
    "prune sweep": "nd_jax.commands.prune_sweep:prune_sweep",
    "prune correlate": "nd_jax.commands.prune_correlate:prune_correlate",
    "prune widths": "nd_jax.commands.prune_widths:prune_widths",
    "combine": "nd_jax.commands.report:combine",
    "generate": "nd_jax.commands.generate:generate",
    "evaluate": "nd_jax.commands.evaluate:evaluate",
    "evaluate vbench-videos": "nd_jax.commands.vbench:vbench_videos",
    "evaluate vbench-run": "nd_jax.commands.vbench:vbench_run",
    "evaluate vbench-table": "nd_jax.commands.vbench:vbench_table",
    "report steps": "nd_jax.commands.report:report_steps",
    "convert import": "nd_jax.commands.convert:convert_import",
    "convert export": "nd_jax.commands.convert:convert_export",
    "npu build": "nd_jax.commands.npu:npu_build",
    "npu calibrate": "nd_jax.commands.npu:npu_calibrate",
    "npu run": "nd_jax.commands.npu:npu_run",
    "npu inspect": "nd_jax.commands.npu:npu_inspect",
    "npu judge": "nd_jax.commands.npu:npu_judge",
    "npu compile": "nd_jax.commands.hexagon:npu_compile",
    "npu emulate": "nd_jax.commands.hexagon:npu_emulate",
    "npu handover": "nd_jax.commands.hexagon:npu_handover",
    "npu compare": "nd_jax.commands.hexagon:npu_compare",
    "verify": "nd_jax.commands.verify:verify",
}

SUMMARIES = {
    "demo": "the whole chain, small, on this machine, ending in report.html",
    "data prepare": "draw the shapes dataset",
    "data videos": "make a dataset of your own captioned clips",
    "data latents": "encode a dataset with a codec, once",
    "data precompute": "clips and prompts to shards of latents and text features, with Apache Beam",
    "data reconstruct": "PSNR and SSIM of a codec on held-out clips",
    "data prompts": "make a corpus of prompts to distil text encoders on",
    "data features": "what a teacher's denoiser reads of prompts, once",
    "train": "run one recipe of a preset",
    "plan": "what every run would need on a TPU slice, from programs compiled for it here",
    "prune importance": "block influence of a checkpoint's denoiser",
    "prune apply": "remove blocks from a checkpoint's denoiser",
    "prune sweep": "search which blocks, heads or channels can go, thousands of candidates at a time",
    "prune correlate": "train some of a sweep's candidates, and see which scores foretold the outcome",
    "prune widths": "narrower blocks: fewer heads and hidden channels",
    "combine": "one system of denoiser, text encoder and decoder that were distilled apart",
    "generate": "prompts to videos, from any official-layout folder",
    "evaluate": "generate, judge and write a report",
    "evaluate vbench-videos": "the videos that VBench scores",
    "evaluate vbench-run": "score them with VBench's official runner",
    "evaluate vbench-table": "VBench's totals, beside the published ones",
    "report steps": "few-step systems beside their teacher: calls, time, accuracy, motion",
    "convert import": "official PyTorch folder to nd-jax's own form",
    "convert export": "nd-jax's own form to an official PyTorch folder",
    "npu build": "a checkpoint as a bundle of ONNX graphs for phones",
    "npu calibrate": "record what the pipeline feeds a bundle's graphs",
    "npu run": "a video from a bundle, without JAX",
    "npu inspect": "operators, bytes, SNR and estimates of a bundle",
    "npu judge": "a shapes bundle's videos beside JAX's",
    "npu compile": "Hexagon context binaries of a bundle's graphs",
    "npu emulate": "compiled graphs in Qualcomm's emulator: SNR, whole videos",
    "npu handover": "binaries, vectors and scripts for a phone engineer",
    "npu compare": "what came back from a device: SNR, latencies",
    "verify": "recompute golden cases and compare",
}


HELP = ("-h", "--help", "help")


def usage(group: str | None = None) -> str:
    """All verbs, or those that begin with the word ``group``."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {SUMMARIES[verb]}" for verb in VERBS if group in (None, verb.split()[0])]
    return (
        "usage: nd-jax VERB [options]   (nd-jax VERB --help lists a verb's options with defaults and units)\n\n"
        + "\n".join(lines)
    )


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The longest known verb at the start of ``arguments`` and what follows it."""
    for words in (2, 1):
        verb = " ".join(arguments[:words])
        if verb in VERBS:
            return verb, list(arguments[words:])
    first = arguments[0]
    known = [verb for verb in VERBS if verb.split()[0] == first] or sorted({verb.split()[0] for verb in VERBS})
    raise UserError(f"unknown command {' '.join(arguments[:2])!r}: expected one of {', '.join(known)}")


def parse(target: Callable, arguments: Sequence[str], prog: str) -> Any:
    """What tyro makes of ``target`` and the arguments.

    Raises UserError, one line, where tyro would draw a box, and SystemExit after printing help.
    """
    refuse_buckets(arguments, prog)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _unwrapped(arguments):
            return tyro.cli(target, args=list(arguments), prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{prog}: {one_line(complaint.getvalue())}; see {prog} --help") from None


def refuse_buckets(arguments: Sequence[str], prog: str) -> None:
    """Raises UserError for a bucket's URL in place of a path: ArrayRecord opens files only, as do locks, metrics and
    checksums here. JAX itself keeps its compile cache in buckets."""
    option = ""
    for word in arguments:
        option = word.partition("=")[0] if word.startswith("--") else option
        found = BUCKET.fullmatch(word)
        if found and option != "--loop.compile-cache":
            raise UserError(
                f"{prog}: {found['url']} is a bucket's address, expected a path; mount the bucket (Cloud Storage FUSE, "
                "docs/pods.md) and give the folder in there"
            )


def later(function: Callable) -> Callable:
    """``function`` for ``parse``, which gets back the call instead of making it."""

    @functools.wraps(function)
    def note(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(function, *args, **kwargs)

    return note


@contextlib.contextmanager
def _unwrapped(arguments: Sequence[str]) -> Iterator[None]:
    """Lines so long that no message is broken in two, except for help, which people read in their terminal."""
    if {"-h", "--help"} & set(arguments):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


TITLE = re.compile(r"^(╭.*|╰.*| \S.*\n -{3,} *)$", re.MULTILINE)
RULE = re.compile(r"^[│ ]*[─-]{3,}[│ ]*$", re.MULTILINE)
BUCKET = re.compile(r"(--[\w.-]+=)?(?P<url>(gs|gcs|s3|az|abfs|hdfs|hf)://\S*)")
"""A word of the command line that is one. Values such as Beam's ``temp_location=gs://...`` are none."""
REPEATED = ("For full helptext", "Argument helptext", "nd-jax ")
"""How those parts of a complaint begin that the help text says as well."""


def one_line(boxes: str) -> str:
    """What tyro's boxes (drawn in Unicode or ASCII) say, without what they repeat of the help text."""
    told = []
    for part in RULE.sub("\0", TITLE.sub("\0", boxes)).split("\0"):
        words = " ".join(part.replace("│", " ").split()).rstrip(".")
        if words.startswith("Perhaps you meant: "):
            told.append(f"perhaps {words.split()[3]}?")
        elif words and not words.startswith(REPEATED):
            told.append(words)
    return "; ".join(told) or " ".join(boxes.split())


def load(verb: str) -> Callable:
    module, function = VERBS[verb].split(":")
    return getattr(importlib.import_module(module), function)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Raises UserError for bad input."""
    verb, rest = split_verb(arguments)
    function = load(verb)
    if hasattr(function, "resolve"):  # its options depend on its first words
        target, rest, prog, work = function.resolve(rest)
        return int(work(parse(target, rest, prog)) or 0)
    return int(parse(later(function), rest, f"nd-jax {verb}")() or 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, telling what went wrong in one line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in HELP:
        print(usage())
        return 0
    groups = {verb.split()[0] for verb in VERBS} - VERBS.keys()
    if arguments[0] in groups and arguments[1:] and arguments[1] in HELP:
        print(usage(arguments[0]))
        return 0
    try:
        return run(arguments)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
