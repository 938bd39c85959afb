"""The ``nd-jax`` command: verbs, their help, one-line errors and exit codes.

Exit codes: 0 done, 1 a check failed (``verify``), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence

import tyro

from nd_jax.errors import UserError

# verb (and sub-verb) -> module:function. Modules are imported only when their verb is used: jax takes a second to load.
VERBS = {
    "demo": "nd_jax.demo:demo",
    "data prepare": "nd_jax.commands:data_prepare",
    "data latents": "nd_jax.commands:data_latents",
    "train": "nd_jax.commands:train",
    "prune importance": "nd_jax.commands:prune_importance",
    "prune apply": "nd_jax.commands:prune_apply",
    "generate": "nd_jax.commands:generate",
    "evaluate": "nd_jax.commands:evaluate",
    "convert import": "nd_jax.commands:convert_import",
    "convert export": "nd_jax.commands:convert_export",
    "verify": "nd_jax.commands:verify",
}

SUMMARIES = {
    "demo": "the whole chain, small, on this machine, ending in report.html",
    "data prepare": "draw the shapes dataset",
    "data latents": "encode a dataset with a codec, once",
    "train": "run one recipe of a preset",
    "prune importance": "block influence of a checkpoint's denoiser",
    "prune apply": "remove blocks from a checkpoint's denoiser",
    "generate": "prompts to videos, from any official-layout folder",
    "evaluate": "generate, judge and write a report",
    "convert import": "official PyTorch folder to nd-jax's own form",
    "convert export": "nd-jax's own form to an official PyTorch folder",
    "verify": "recompute golden cases and compare",
}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {SUMMARIES[verb]}" for verb in VERBS]
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


def parse(target: Callable, arguments: Sequence[str], prog: str, **options):
    """``tyro.cli`` whose complaints are one ``UserError`` line instead of a box."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(target, args=list(arguments), prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        kept = [line.strip("│╭╮╰╯─ \n") for line in complaint.getvalue().splitlines()]
        text = " ".join(line for line in kept if line and not line.startswith("For full helptext"))
        raise UserError(f"{prog}: {text}; see {prog} --help") from None


def load(verb: str) -> Callable:
    module, function = VERBS[verb].split(":")
    return getattr(importlib.import_module(module), function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    try:
        verb, rest = split_verb(arguments)
        function = load(verb)
        if hasattr(function, "parse_arguments"):  # verbs whose options depend on their first words
            result = function.parse_arguments(rest)
        else:
            result = parse(function, rest, f"nd-jax {verb}", config=(tyro.conf.OmitArgPrefixes,))
        return int(result or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
