"""Step distillation from folder to folder, and by command."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
import tiny_system
import training_toy as toy

from nd_jax import cli, workflow
from nd_jax.commands.generate import changed_plan
from nd_jax.converters.component import save_component
from nd_jax.data.latents import write_latents
from nd_jax.dmd_workflow import distil_steps, longest
from nd_jax.errors import UserError
from nd_jax.models.system import CODEC, DENOISER, TEXT_PARTS
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.adversarial import AdversarialConfig
from nd_jax.recipes.dmd_config import DmdRecipeConfig
from nd_jax.recipes.mean_flow import MeanFlowConfig
from nd_jax.recipes.preset import AdversarialRun, DmdRun, MeanFlowRun, Preset, ProgressiveRun, load_preset
from nd_jax.recipes.progressive import ProgressiveConfig
from nd_jax.system import TOKENIZERS, load_system, save_system
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.loop import LoopConfig
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.workflow import without_blocks

RUNS = {
    "student": DmdRun(
        DmdRecipeConfig(batch=2, stage_mix=(0, 1, 0), steps=(1, 2, 1), own_history=1.0, videos=False, cauchy_weight=0.0)
    ),
    "progressive": ProgressiveRun(ProgressiveConfig(batch=2, stage_mix=(0, 1, 0), rounds=2, round_steps=1)),
    "mean_flow": MeanFlowRun(MeanFlowConfig(batch=2, stage_mix=(0, 1, 0), steps=(2, 2, 1))),
    "adversarial": AdversarialRun(AdversarialConfig(batch=2, stage_mix=(0, 1, 0), features=2)),
}


@pytest.fixture
def go(tiny, tiny_folder, tmp_path, monkeypatch):
    """Function (start, teacher) -> outcome and student after two steps on six tiny clips."""
    latents = np.random.Generator(np.random.Philox(0)).standard_normal((6, 2, 8, 8, 4), np.float32)
    write_latents(tmp_path / "latents", [latents], [[f"a red ball {n}"] for n in range(6)])
    save_component(tmp_path / "codec", tiny.config.causal_video_vae, tiny.params[CODEC])
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(workflow, "make_mesh", lambda config: one)
    run = DmdRun(
        DmdRecipeConfig(batch=2, stage_mix=(0, 1, 0), steps=(1, 2, 1), renew=True), LoopConfig(steps=2, save_every=0)
    )
    preset = Preset("tiny", tiny.config, tiny_system.VIDEO, tiny_system.PLAN, {"student": run})
    tokenizers = {name: tiny_folder / "tokenizers" / name for name in TOKENIZERS.values()}
    options = {"latents": tmp_path / "latents", "codec_folder": tmp_path / "codec", "tokenizers": tokenizers}
    return partial(distil_steps, preset, "student", run, tmp_path / "run", **options, quiet=True)


@pytest.mark.heavy
def test_a_pruned_system_learns_from_the_whole_one(go, tiny, tiny_folder, tmp_path):
    """The folder that comes out says by itself how it is sampled, and which blocks it has."""
    pruned, kept = without_blocks(tiny, (1,))
    outcome, student = go(start=pruned, teacher=tiny)
    assert outcome.finished
    tokenizers = {name: tiny_folder / "tokenizers" / name for name in TOKENIZERS.values()}
    again = load_system(save_system(tmp_path / "system", student, tokenizers))
    assert again.sampling == SamplePlan((1, 2, 1), (1, 2, 1), grid="plain", renew=True)
    assert again.kept_blocks == kept
    for name in TEXT_PARTS:
        toy.assert_same(toy.numbers(again.params[name]), toy.numbers(tiny.params[name]))
    begun, made = (toy.numbers(system.params[DENOISER]) for system in (pruned, again))
    assert any((made[name] != value).any() for name, value in begun.items())
    frozen = toy.numbers(load_tree(tmp_path / "run", f"frozen/{DENOISER}"))
    toy.assert_same(frozen, toy.numbers(tiny.params[DENOISER]))
    negative = load_tree(tmp_path / "run", "frozen/negative")
    expected, _ = tiny.conditions([""])
    cut = negative["mask"].shape[1]
    assert cut == longest(tiny, [f"a red ball {n}" for n in range(6)]) < tiny_system.TEXT_LENGTH
    expected = expected._replace(text=expected.text[:, :cut], mask=expected.mask[:, :cut])
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(negative[name], value, atol=1e-5, err_msg=name)


def test_a_teacher_that_reads_otherwise_is_refused(go, tiny):
    text = {**tiny.params, "text_encoder": jax.tree.map(lambda x: x + 1, tiny.params["text_encoder"])}
    with pytest.raises(UserError, match="text_encoder of the teacher is not the student's"):
        go(start=tiny, teacher=dataclasses.replace(tiny, params=text))
    wider = dataclasses.replace(tiny.config.diffusion_transformer, patch_size=2)
    config = dataclasses.replace(tiny.config, diffusion_transformer=wider)
    with pytest.raises(UserError, match="diffusion_transformer of the teacher is not the student's"):
        go(start=tiny, teacher=dataclasses.replace(tiny, config=config))


@pytest.mark.heavy
@pytest.mark.parametrize("name", RUNS)
def test_every_way_of_distilling_goes_on_where_it_stopped(name, tiny, go, tiny_folder, tmp_path):
    """Two steps at once, and one and one, give the same system to the last bit; prompts alone will do for the first."""
    preset = Preset("tiny", tiny.config, tiny_system.VIDEO, tiny_system.PLAN, RUNS, world="64x64")
    found = []
    with toy.compiled_once(tmp_path / "compiled"):
        for folder, counts in (("once", (2,)), ("twice", (1, 2))):
            for steps in counts:
                run = dataclasses.replace(RUNS[name], loop=LoopConfig(steps=steps, save_every=0))
                options = dict(go.keywords) | ({} if run.recipe.videos else {"latents": ()})
                outcome, made = distil_steps(preset, name, run, tmp_path / folder, start=tiny, **options)
                assert (outcome.finished, outcome.step_compilations) == (True, 1)
            found.append(made)
    assert found[0].sampling == SamplePlan(run.recipe.steps, run.recipe.steps, grid="plain")
    toy.assert_same(*(toy.numbers(system.params[DENOISER]) for system in found))
    begun, made = toy.numbers(tiny.params[DENOISER]), toy.numbers(found[0].params[DENOISER])
    assert any((made[name] != value).any() for name, value in begun.items())


def test_step_distillation_by_command(tiny_folder, tmp_path, capsys):
    """Settings are options; what is wrong with them is told in one line."""
    train = ["train", "shapes_base", "student", "--out", str(tmp_path / "run"), "--latents", str(tmp_path)]
    train += ["--start", str(tiny_folder / "system"), "--recipe.fake-optim.learning-rate", "1e-4"]
    assert cli.main([*train, "--recipe.weighting", "other"]) == 2
    assert "--recipe.weighting" in capsys.readouterr().err
    assert cli.main([*train, "--recipe.steps", "4", "4", "4"]) == 2
    assert "latents" in capsys.readouterr().err
    assert cli.main([*train[:5], *train[7:9], "--recipe.own-history", "1"]) == 2
    assert "expected --latents FOLDER alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for preset in ("shapes_base", "neodragon_320p"):
        assert load_preset(preset).run("student").recipe.fake_updates == 2
        shared = [load_preset(preset).run(name).recipe for name in RUNS]
        for field in ("steps", "first_guidance", "later_guidance", "batch", "stage_mix"):
            assert len({getattr(recipe, field) for recipe in shared}) == 1, field


def test_a_plan_may_be_changed_by_command():
    """Fresh noise on or off, whatever the folder says; left alone without the option."""
    plan = SamplePlan((1, 2, 1), (1, 1, 1), grid="plain", renew=True)
    nothing = (None,) * 5
    assert changed_plan(plan, *nothing, 3) == plan
    assert changed_plan(plan, *nothing, 3, "no") == dataclasses.replace(plan, renew=False)
    off = dataclasses.replace(plan, renew=False)
    assert (changed_plan(off, *nothing, 3), changed_plan(off, *nothing, 3, "yes")) == (off, plan)
