"""``nd-jax prune widths``."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, say
from nd_jax.commands.prune import Mode, calibration_prompts
from nd_jax.errors import UserError
from nd_jax.outputs import check_new


def prune_widths(
    checkpoint: Positional[Path],
    out: Path,
    heads: int | None = None,
    mlp: int | None = None,
    text_mlp: int | None = None,
    budget_parameters: int | None = None,
    budget_macs: float | None = None,
    budget_bytes: int | None = None,
    budget_ms: float | None = None,
    target: str = "sm8750",
    fit: bool = True,
    damping: float = 1e-4,
    mode: Mode | None = None,
    prompts: int = 16,
    samples: int = 1,
    steps: int | None = 2,
    probes: int = 4,
    prompt_file: Path | None = None,
    plain: bool = False,
    seed: int = 0,
    batch: int = 8,
    overwrite: bool = False,
) -> None:
    """Take heads and hidden channels out of every block of a checkpoint's denoiser.

    The least important ones of each block go, by Taylor scores; the layers that read them are fitted to what they gave
    before. Arrays shrink; blocks stay equally wide. The official classes know no such network: the folder is for nd-jax
    and for NPU graphs.

    Args:
        checkpoint: official-layout folder.
        out: folder for the smaller system.
        heads: heads that every block keeps; default: all.
        mlp: hidden channels that every block's image MLP keeps; default: all.
        text_mlp: hidden channels that every block's text MLP keeps; default: all.
        budget_parameters: parameters that the denoiser may have, instead of these numbers.
        budget_macs: multiply-adds that a video's denoiser calls may take, instead, in 10^9.
        budget_bytes: bytes that the phone's weights (8 bits) may take, instead.
        budget_ms: milliseconds that a video's denoiser calls are estimated to take on the target, instead.
        target: the chip that budget-ms is about.
        fit: fit the next layers by least squares.
        damping: of the fit, relative to its inputs' mean square.
        mode: which denoiser, where the folder has both.
        prompts: how many prompts to calibrate on; times samples a multiple of batch.
        samples: videos of every prompt.
        steps: noise levels of every stage, evenly spread over its steps.
        probes: random directions for Taylor scores.
        prompt_file: text file with one prompt per line; default: prompts of the shapes world.
        plain: word the shapes world's prompts all alike.
        seed: of prompts, noise and directions.
        batch: videos at a time.
        overwrite: replace an existing folder.
    """
    from nd_jax.converters.bundle.targets import chosen

    (chip,) = chosen((target,))
    macs = None if budget_macs is None else budget_macs * 1e9
    budgets = {
        "parameters": budget_parameters,
        "macs": macs,
        "bytes": budget_bytes,
        f"ms_{chip.name}": budget_ms,
    }
    given = {name: value for name, value in budgets.items() if value is not None}
    asked = [size for size in (heads, mlp, text_mlp) if size is not None]
    if bool(asked) == bool(given) or len(given) > 1:
        raise UserError("prune widths: expected --heads, --mlp and --text-mlp, or one --budget-...")
    check_at_least(1, prompts=prompts, samples=samples, batch=batch, probes=probes)
    check_at_least(0, seed=seed)
    if not damping >= 0:
        raise UserError(f"--damping is {damping}, expected at least 0")
    check_new(out, overwrite=overwrite)
    from nd_jax.converters.folders import load_folder
    from nd_jax.models.functional import count_parameters
    from nd_jax.models.system import DENOISER
    from nd_jax.system import load_system, save_system
    from nd_jax.width_workflow import Sizes, narrow_system, within

    system = load_system(checkpoint, mode=mode, dtype=None)
    config = system.config.diffusion_transformer
    if given:
        ((name, budget),) = given.items()
        choose = within(name, budget)
    else:
        sizes = Sizes(heads, mlp, text_mlp).of(config)
        choose = lambda generator, worth: sizes  # noqa: E731
    captions = calibration_prompts(prompt_file, prompts, seed=seed, plain=plain)
    options = {"seed": seed, "samples": samples, "steps": steps, "batch": batch, "probes": probes}
    smaller, _ = narrow_system(system, captions, choose, fit=fit, damping=damping, told=say, **options)
    save_system(out, smaller, load_folder(system.folder).tokenizers, dtype=None, overwrite=overwrite)
    made = smaller.config.diffusion_transformer
    before, after = (count_parameters(each.params[DENOISER]) for each in (system, smaller))
    say(
        f"kept {made.heads} of {config.heads} heads, {made.mlp_channels} of {config.mlp_channels} hidden channels, of "
        f"the text's MLP {made.text_mlp_channels} of {config.text_mlp_channels}; {before} to {after} parameters"
    )
    if not made.official:
        say(NOT_OFFICIAL)
    print(out)


NOT_OFFICIAL = (
    "note: the official config.json cannot say how many heads and hidden channels a block keeps, so the official "
    "PyTorch classes cannot load this denoiser; nd-jax can, and nd-jax npu build makes graphs of it"
)
