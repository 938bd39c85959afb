"""Text distillation from prompts to a system with the student in place, live and from computed targets."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import text_teachers
from text_teachers import CONFIG, ENCODER, SYSTEM, prompts, recipe, student_params
from training_toy import MEASURED, assert_same, numbers

import nd_jax.text_workflow as workflow
from nd_jax.data.text_features import FeatureSource
from nd_jax.errors import UserError
from nd_jax.models.functional import count_parameters
from nd_jax.models.system import ADAPTER, CLIP_1, CLIP_2, DENOISER, T5
from nd_jax.recipes.preset import TextDistillRun
from nd_jax.recipes.text_teacher import EMBEDDER, embed
from nd_jax.system import VideoSystem, load_system, save_system
from nd_jax.text_report import text_report, text_states
from nd_jax.training.loop import LoopConfig
from nd_jax.training.metrics import read_metrics

TEXTS = ["a red circle", "", "two small crosses move left and up on white"]


@pytest.fixture(scope="module")
def teacher(tiny) -> VideoSystem:
    return dataclasses.replace(tiny, config=SYSTEM, params=text_teachers.random_params())


def run(steps: int = 6, **changes) -> TextDistillRun:
    return TextDistillRun(
        encoder=ENCODER,
        adapter=text_teachers.adapter(changes.get("mode", "replace")),
        recipe=dataclasses.replace(CONFIG, **changes),
        loop=LoopConfig(steps=steps, save_every=3),
    )


def distil(folder, teacher, settings, **options):
    options = {"prompts": prompts()} | options
    return workflow.train_text_student("tiny/text", settings, folder, teacher=teacher, quiet=True, **options)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """Six steps of a student with low-rank factors, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *distil(folder, teacher, run(encoder="lora"), start=student_params())


def test_a_resumed_run_cannot_be_told_from_a_whole_one(teacher, whole, tmp_path):
    """Trained, averaged and frozen parameters, moments and key, and the logged terms."""
    for steps in (3, 6):
        outcome, _ = distil(tmp_path, teacher, run(steps, encoder="lora"), start=student_params())
    assert_same(numbers(outcome.state), numbers(whole[1].state))
    logged, expected = (
        [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
        for rows in (read_metrics(tmp_path), read_metrics(whole[0]))
    )
    assert logged == expected
    assert {"loss", "term/mse", "term/cosine", "relative"} <= set(logged[0])


def test_the_system_conditions_as_the_student_does(teacher, whole, tmp_path):
    """In replace mode: T5, adapter, a denoiser without embedder; also after a trip through an official folder."""
    _, outcome, system = whole
    tokens, _ = system.tokens(TEXTS)
    made = recipe(encoder="lora")
    expected = made.student(outcome.state.ema, outcome.state.frozen, tokens.t5_ids, tokens.t5_mask)
    assert not system.config.diffusion_transformer.context_embedder
    shapes = jax.tree.map(np.shape, system.params)
    assert shapes == jax.tree.map(lambda x: x.shape, {k: d.abstract() for k, d in system.definitions.items()})
    folders = {
        name: folder.folder
        for name, folder in zip(("tokenizer_3", "tokenizer", "tokenizer_2"), system.tokenizers.values(), strict=True)
    }
    for each in (system, load_system(save_system(tmp_path / "system", system, folders))):
        conditions, _ = each.conditions(TEXTS)
        np.testing.assert_allclose(conditions.text, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(conditions.mask, tokens.t5_mask)
        pooled = teacher.conditions(TEXTS)[0].pooled
        np.testing.assert_allclose(conditions.pooled, pooled, rtol=1e-6)


def test_an_extending_student_keeps_the_embedder(teacher):
    networks = student_params("extend")
    system = workflow.with_student(teacher, ENCODER, text_teachers.adapter("extend"), networks, mode="extend")
    assert system.params[DENOISER] is teacher.params[DENOISER]
    made = recipe(mode="extend")
    tokens, _ = system.tokens(TEXTS)
    frozen = {"teacher": {EMBEDDER: teacher.params[DENOISER][EMBEDDER]}}
    expected = made.student(networks, frozen, tokens.t5_ids, tokens.t5_mask)
    conditions, _ = system.conditions(TEXTS)
    read = embed(system.params[DENOISER][EMBEDDER], conditions.text)
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(text_states(system, TEXTS, batch=2)[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="adapter gives 24 channels, mode 'replace' expects 16"):
        workflow.with_student(teacher, ENCODER, text_teachers.adapter("extend"), networks)


def test_computed_targets_train_as_the_live_teacher_does(teacher, whole, tmp_path):
    source = prompts(empty=0.0)
    workflow.encode_prompts(teacher, source, tmp_path / "features", batch=16)
    features = FeatureSource(tmp_path / "features")
    texts = [source[n]["caption"] for n in range(len(source))]
    wanted, mask = text_states(teacher, texts)
    assert len(features) == len(source)
    for index in (0, 17, 39):
        example = features[index]
        np.testing.assert_array_equal(example["t5_mask"], mask[index])
        valid = mask[index] > 0
        np.testing.assert_allclose(example["target"][valid], wanted[index][valid], rtol=1e-5, atol=1e-6)
    settings = run(3)
    computed, _ = distil(tmp_path / "a", teacher, settings, prompts=None, features=tmp_path / "features")
    live, _ = distil(tmp_path / "b", teacher, settings, prompts=source)
    assert computed.state.frozen is None
    for name, value in numbers(live.state.params).items():
        np.testing.assert_allclose(numbers(computed.state.params)[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    with pytest.raises(UserError, match="expected either prompts or computed"):
        distil(tmp_path / "c", teacher, settings, features=tmp_path / "features")
    longer = dataclasses.replace(teacher, video=dataclasses.replace(teacher.video, text_length=16))
    with pytest.raises(UserError, match="targets of 12 tokens x 16 channels, expected 16 x 16"):
        distil(tmp_path / "c", longer, settings, prompts=None, features=tmp_path / "features")


def test_the_report_tells_a_trained_student_from_a_fresh_one(teacher, tmp_path):
    outcome, student = distil(tmp_path, teacher, run(80))
    assert outcome.finished
    fresh = workflow.with_student(teacher, ENCODER, text_teachers.adapter(), student_params())
    source = prompts(60)
    held_out = [source[n]["caption"] for n in range(40, 60)]
    trained, untrained = (text_report(teacher, x, held_out, batch=20) for x in (student, fresh))
    assert trained["relative_mse"] < 0.7 * untrained["relative_mse"]
    assert trained["cosine"] > untrained["cosine"] + 0.2
    assert trained["pooled_towers"] == "kept"
    own = {name: student.params[name] for name in (T5, ADAPTER)}
    assert trained["student_parameters"] == count_parameters(own)
    swapped = dataclasses.replace(student, params={**student.params, CLIP_1: student.params[CLIP_2]})
    assert text_report(teacher, swapped, held_out, batch=20)["pooled_towers"] == "changed"


def test_a_runs_prompts_are_its_folders_and_captions():
    source = workflow.prompt_source(run(captions=200, empty=0.1))
    texts = [source[n]["caption"] for n in range(len(source))]
    assert len(texts) == 200
    assert 18 <= texts.count("") <= 22
    held_out = workflow.prompt_source(run(captions=200, empty=0.1), split="held_out")
    assert "" not in {held_out[n]["caption"] for n in range(200)}
    with pytest.raises(UserError, match="there are none"):
        workflow.prompt_source(run())
