"""``nd-jax verify DIR``: every golden case in DIR, recomputed and compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nd_jax.errors import UserError
from nd_jax.verification.cases import Case, Subcase, find_cases
from nd_jax.verification.kinds import RECOMPUTE, kind_of
from nd_jax.verification.rows import Row, Status, compare
from nd_jax.verification.tolerances import tolerance


def verify_subcase(subcase: Subcase, kind: str, outputs) -> Iterator[Row]:
    """Compare all that the subcase expects with ``outputs``, pairs of name and value.

    A recomputed array that is recorded among the inputs is compared too. What nothing was recomputed for, or no
    tolerance is known for, is a row of its own.
    """
    case, seen = subcase.case.name, set()
    for output, value in outputs:
        expected = subcase.outputs.get(output, subcase.inputs.get(output))
        allowed = tolerance(kind, subcase.name, output)
        if expected is None or allowed is None:
            continue
        seen.add(output)
        yield compare(case, subcase.name, output, value, expected, allowed)
    for output in subcase.outputs:
        if output not in seen:
            yield Row(case, subcase.name, output, Status.NOT_COMPARED)


def verify_case(case: Case) -> Iterator[Row]:
    """Rows of one case, at the highest matrix precision the device has.

    Raises:
        UserError: if the case is malformed.
    """
    kind = kind_of(case)
    if kind is None:
        yield Row(case.name, "", "", Status.NO_NETWORK)
        return
    with jax.default_matmul_precision("highest"):
        try:
            recompute = RECOMPUTE[kind](case)
            for subcase in case.subcases():
                yield from verify_subcase(subcase, kind, recompute(subcase))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"golden case {case.name} cannot be recomputed: {type(error).__name__}: {error}; "
                "expected files as golden/README.md describes them"
            ) from error


def verify(folder: Path | str) -> list[Row]:
    """Every case found in ``folder`` (or ``folder`` itself): one row per output array, one per case without network.

    Raises:
        UserError: if there is no case, or one is malformed.
    """
    return [row for case in find_cases(Path(folder)) for row in verify_case(case)]


def summary(rows: list[Row]) -> Table:
    """One line per subcase and tolerance, with the largest error; every failure on a line of its own."""
    table = Table("case", "subcase", "arrays", "worst", "max abs error", "tolerance", "pass")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        alone = row.output if row.status is Status.FAIL else ""
        groups.setdefault((row.case, row.subcase, row.status, str(row.tolerance or ""), alone), []).append(row)
    for (case, subcase, status, allowed, _), group in groups.items():
        worst = max(group, key=lambda row: row.error or 0.0)
        error = "" if worst.error is None else f"{worst.error:.1e}"
        count = str(len(group)) if worst.output else ""
        style = {Status.PASS: None, Status.FAIL: "bold red"}.get(status, "yellow")
        mark = f"{status.value} {worst.note}".strip()
        table.add_row(case, subcase, count, worst.output, error, allowed, mark, style=style)
    return table


def run(folder: Path) -> int:
    """Verify, print the table and the counts; 0 if nothing failed, else 1.

    Raises:
        UserError: as ``verify``.
    """
    cases, rows = find_cases(Path(folder)), []
    with Progress(transient=True) as progress:
        for case in progress.track(cases, description="recomputing"):
            rows += verify_case(case)
    Console(width=None).print(summary(rows))
    counts = {status: sum(row.status is status for row in rows) for status in Status}
    print(
        f"{len(cases)} cases: {counts[Status.PASS]} arrays pass, {counts[Status.FAIL]} fail, "
        f"{counts[Status.NOT_COMPARED]} not compared; {counts[Status.NO_NETWORK]} cases without a network"
    )
    return int(counts[Status.FAIL] > 0)
