"""Judging a bundle's videos beside JAX's, prompt by prompt, in one go and in two."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from npu_systems import student_system
from tiny_system import PLAN

from nd_jax import npu_judge
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.errors import UserError
from nd_jax.npu_judge import Paired, judge_bundle
from nd_jax.npu_workflow import build_bundle
from nd_jax.pyramid.sampler import SamplePlan

QUICK = SamplePlan(PLAN.first_steps, PLAN.later_steps, 0.0, 0.0, "plain")


@pytest.fixture(scope="module")
def system(tiny_folder):
    return student_system(tiny_folder / "tokenizers", plan=QUICK, frames=9)


@pytest.fixture(scope="module")
def bundle(system, tmp_path_factory):
    return build_bundle(system, tmp_path_factory.mktemp("npu") / "bundle", check=False)


@pytest.mark.heavy
def test_pairs_and_goes_on(bundle, system, tmp_path, monkeypatch):
    """An interrupted judgement and its rest give what one without interruption gives; nothing is made twice."""
    monkeypatch.setattr(npu_judge, "BATCH", 2)
    made, kept = [], Pipeline.video

    def video(self, prompt, **options):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(options["sample_name"])
        return kept(self, prompt, **options)

    monkeypatch.setattr(Pipeline, "video", video)
    file, told = tmp_path / "record.json", []
    with pytest.raises(KeyboardInterrupt):
        judge_bundle(bundle, system, 5, file=file, progress=lambda *counts: told.append(counts))
    assert told == [(0, 5), (1, 5), (2, 5), (3, 5)]
    assert len(json.loads(file.read_text())["rows"]) == 2, "whole batches are kept"
    made.clear()
    monkeypatch.setattr(Pipeline, "video", lambda *a, **k: made.append(k["sample_name"]) or kept(*a, **k))
    found = judge_bundle(bundle, system, 5, file=file, progress=lambda *counts: told.append(counts))
    assert made == [2, 3, 4]
    assert told[4:] == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert found.prompts == 5
    assert found.pixel_error < 0.5, "the same noise: the same videos, up to rounding"
    assert abs(found.bundle - found.jax) < 0.05
    assert found.low <= found.bundle - found.jax <= found.high
    made.clear()
    assert judge_bundle(bundle, system, 5, file=file) == found
    assert not made
    rows = json.loads(file.read_text())["rows"]
    assert np.mean([row[0] for row in rows]) == pytest.approx(found.jax)


def test_records_of_something_else(bundle, system, tmp_path):
    file = tmp_path / "record.json"
    judge_bundle(bundle, system, 2, file=file)
    with pytest.raises(UserError, match="another bundle, checkpoint or options"):
        judge_bundle(bundle, system, 3, file=file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"rows": [[1, 2]]}))
    with pytest.raises(UserError, match="expected three numbers"):
        judge_bundle(bundle, system, 2, file=file)
    other = student_system(system.folder, plan=QUICK, frames=17)
    with pytest.raises(UserError, match="expected the checkpoint that the bundle was built from"):
        judge_bundle(bundle, other, 2)


def test_what_is_told():
    lines = Paired(100, 0.9, 0.89, -0.03, 0.01, 1.5).lines()
    assert lines[1] == "difference -1.0%, 95 % interval [-3.0%, +1.0%]; within 2 points"
    assert "NOT within" in Paired(100, 0.9, 0.87, -0.05, 0.01, 1.5).lines()[1]
