"""``nd-jax verify DIR``: every golden case in DIR, recomputed and compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from nd_jax.errors import UserError
from nd_jax.verification.cases import Case, Outputs, Subcase, find_cases
from nd_jax.verification.kinds import RECOMPUTE, kind_of
from nd_jax.verification.rows import Row, Status, compare
from nd_jax.verification.tolerances import BFLOAT16, tolerance

Dtype = Literal["float32", "bfloat16"]


def _verify_subcase(subcase: Subcase, kind: str, outputs: Outputs, bfloat16: bool) -> Iterator[Row]:
    """Compare all that the subcase expects with ``outputs``.

    A recomputed array that is recorded among the inputs is compared too. What nothing was recomputed for, or no
    tolerance is known for, is a row of its own.
    """
    case, seen = subcase.case.name, set()
    for output, value in outputs:
        expected = subcase.outputs.get(output, subcase.inputs.get(output))
        allowed = tolerance(kind, subcase.name, output, bfloat16=bfloat16)
        if expected is None or allowed is None:
            continue
        seen.add(output)
        yield compare(case, subcase.name, output, value, expected, allowed)
    for output in subcase.outputs:
        if output not in seen and not bfloat16:
            yield Row(case, subcase.name, output, Status.NOT_COMPARED)


def verify_case(case: Case) -> Iterator[Row]:
    """Rows of one case, with the highest precision of float32 products that the device has.

    Raises:
        UserError: if the case is malformed.
    """
    kind, bfloat16 = kind_of(case), case.dtype == jnp.bfloat16
    if kind is None:
        yield Row(case.name, "", "", Status.NO_NETWORK)
        return
    if bfloat16 and kind not in BFLOAT16:
        return
    with jax.default_matmul_precision("highest"):
        try:
            recompute = RECOMPUTE[kind](case)
            for subcase in case.subcases():
                yield from _verify_subcase(subcase, kind, recompute(subcase), bfloat16)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"golden case {case.name} cannot be recomputed ({type(error).__name__}: {error}); "
                "expected config.json, meta.json, inputs.npz and outputs.npz of one recording"
            ) from error


def verify(folder: Path | str, dtype: Dtype = "float32") -> list[Row]:
    """Every case found in ``folder`` (or ``folder`` itself): one row per output array, one per case without network.

    Args:
        folder: golden cases, one folder each.
        dtype: what networks compute in. With "bfloat16" only networks are compared, by tolerances of their own.

    Raises:
        UserError: if there is no case, or one is malformed.
    """
    cases = find_cases(Path(folder), jnp.dtype(dtype))
    return [row for case in cases for row in verify_case(case)]


def shown(name: str) -> str:
    """A name out of a file nobody vouches for, without anything a terminal would obey."""
    return name if name.isprintable() else repr(name)


def summary(rows: list[Row]) -> Table:
    """One line per subcase and tolerance, with the largest error; every failure on a line of its own."""
    relative = any(row.tolerance and row.tolerance.relative for row in rows)
    error_head = "relative rms error" if relative else "max abs error"
    table = Table("case", "subcase", "arrays", "worst", error_head, "tolerance", "pass")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        alone = row.output if row.status is Status.FAIL else ""
        groups.setdefault((row.case, row.subcase, row.status, str(row.tolerance or ""), alone), []).append(row)
    for (case, subcase, status, allowed, _), group in groups.items():
        worst = max(group, key=lambda row: row.error or 0.0)
        case, subcase, output = (Text(shown(name)) for name in (case, subcase, worst.output))
        error = "" if worst.error is None else f"{worst.error:.1e}"
        count = str(len(group)) if worst.output else ""
        style = {Status.PASS: None, Status.FAIL: "bold red"}.get(status, "yellow")
        mark = f"{status.value} {worst.note}".strip()
        table.add_row(case, subcase, count, output, error, allowed, mark, style=style)
    return table


def run(folder: Path, dtype: Dtype = "float32") -> int:
    """Verify, print the table and the counts; 0 if nothing failed, else 1.

    Arrays that were not compared and cases without a network are listed and counted, and do not fail.

    Raises:
        UserError: as ``verify``, but after all other cases are done and shown.
    """
    cases = find_cases(Path(folder), jnp.dtype(dtype))
    rows: list[Row] = []
    malformed: list[UserError] = []
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    with Progress(console=console, transient=True) as progress:
        for case in progress.track(cases, description="recomputing"):
            try:
                rows += verify_case(case)
            except UserError as error:
                malformed.append(error)
    console.print(summary(rows))
    counts = {status: sum(row.status is status for row in rows) for status in Status}
    console.print(
        f"{len(cases)} cases: {counts[Status.PASS]} arrays pass, {counts[Status.FAIL]} fail, "
        f"{counts[Status.NOT_COMPARED]} not compared; {counts[Status.NO_NETWORK]} cases without a network",
        highlight=False,
    )
    for error in malformed[1:]:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    if malformed:
        raise malformed[0]
    return int(counts[Status.FAIL] > 0)
