"""VBench: sums against published rows, the folder of videos, the runner in another interpreter."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from nd_jax.errors import UserError
from nd_jax.vbench_run import run_dimensions
from nd_jax.vbench_scores import DIMENSIONS, PUBLISHED, aggregate, read_results, scores_table, total
from nd_jax.vbench_videos import missing_videos, parse_share, read_prompts, video_name, wanted_videos

# Percent; quality dimensions first, in the order of DIMENSIONS: Pyramid-Flow's row (arXiv 2410.05954), published with
# total 81.72, quality 84.74 and semantic 69.62. The sixteen scores were written down offline and not compared with the
# leaderboard since; that ranges and weights lead from them to all three published sums is the test.
PYRAMID_FLOW = [96.95, 98.06, 99.49, 99.12, 64.63, 63.26, 65.01]
PYRAMID_FLOW += [86.67, 50.71, 85.60, 82.87, 59.53, 43.20, 20.91, 23.09, 26.23]


def raw_scores():
    return {name: value / 100 for name, value in zip(DIMENSIONS, PYRAMID_FLOW, strict=True)}


def test_published_row():
    found = aggregate(raw_scores())
    assert found["total"] == pytest.approx(81.72, abs=0.015)
    assert found["quality"] == pytest.approx(84.74, abs=0.015)
    assert found["semantic"] == pytest.approx(69.62, abs=0.015)
    assert found["scene"] == pytest.approx(43.20)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    row = PUBLISHED[name]
    assert total(row["quality"], row["semantic"]) == pytest.approx(row["total"], abs=0.0101)


def test_ranges_and_weights():
    low = {name: each.low for name, each in DIMENSIONS.items()}
    high = {name: each.high for name, each in DIMENSIONS.items()}
    assert [aggregate(low)[name] for name in ("total", "quality", "semantic")] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [aggregate(high)[name] for name in ("total", "quality", "semantic")] == pytest.approx([100] * 3)
    assert aggregate(low | {"dynamic_degree": 1.0})["quality"] == pytest.approx(100 * 0.5 / 6.5)
    assert aggregate(low | {"object_class": 1.0})["total"] == pytest.approx(100 / 9 / 5)
    partial = aggregate({name: score for name, score in raw_scores().items() if name != "scene"})
    assert "quality" in partial
    assert "total" not in partial
    assert "semantic" not in partial


def write_results(folder, scores):
    folder.mkdir(exist_ok=True)
    for name, score in scores.items():
        (folder / f"{name}_eval_results.json").write_text(json.dumps({name: [score, [{"video_path": "a.mp4"}]]}))
    return folder


def test_result_files_and_table(tmp_path, run):
    folder = write_results(tmp_path / "ours", raw_scores())
    (folder / "scene_full_info.json").write_text("[]")  # the runner leaves these too
    assert read_results(folder) == pytest.approx(raw_scores())
    code, out, err = run("evaluate", "vbench-table", folder, "--out", tmp_path / "scores.json")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "scores.json")
    for told in ("81.72", "81.61", "79.02", "semantic", "Neodragon"):
        assert told in err
    assert json.loads((tmp_path / "scores.json").read_text())[str(folder)]["total"] == pytest.approx(81.72, abs=0.02)
    table = scores_table({"ours": aggregate(raw_scores())}, published=False)
    assert table.rows[0][:2] == ["ours", "81.72"]
    assert len(table.columns) == 20


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"scene": [1.5, []]}', "from 0 to 1"),
        ('{"scene": ["0.5", []]}', "from 0 to 1"),
        ('{"scene": [true, []]}', "from 0 to 1"),
        ('{"beauty": [0.5, []]}', "not one of VBench's sixteen"),
        ("[]", "scene_eval_results.json"),
        ('{"scene": NaN}', "scene_eval_results.json"),
    ],
)
def test_odd_results_are_refused(tmp_path, content, told):
    (tmp_path / "scene_eval_results.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_results(tmp_path)


def test_no_results(tmp_path):
    with pytest.raises(UserError, match="has no results"):
        read_results(tmp_path)
    write_results(tmp_path, {"scene": 0.5})
    (tmp_path / "other_eval_results.json").write_text('{"scene": [0.6, []]}')
    with pytest.raises(UserError, match="another file"):
        read_results(tmp_path)


def test_names():
    assert video_name("a cat, playing (in snow)", 3) == "a cat, playing (in snow)-3.mp4"
    for odd in ("a/b", "../../etc/passwd", ".hidden", "-rf", "a\nb", "x" * 300, "é" * 100, "", " a", "a:b", "nul\0"):
        name = video_name(odd, 4)
        assert "/" not in name
        assert name.isprintable()
        assert name.isascii()
        assert len(name.encode()) <= 200
        assert name.endswith("-4.mp4")
        assert name[0].isalnum()
    assert len({video_name(odd, 0) for odd in ("x" * 300, "x" * 301, "a/b", "a\\b c")}) == 4
    long = "a" * (200 - len("-0.mp4"))
    assert video_name(long, 0) == f"{long}-0.mp4"
    assert video_name(long + "a", 0) != f"{long}a-0.mp4"


def test_wanted_and_missing(tmp_path):
    wanted = wanted_videos(["a dog", "a cat"])
    assert [each.file for each in wanted[:5]] == [f"a dog-{n}.mp4" for n in range(5)]
    assert len({each.sample for each in wanted}) == 10
    assert all(each.official for each in wanted)
    assert not wanted_videos(["a/b"])[0].official
    (tmp_path / wanted[1].file).write_bytes(b"x")
    assert missing_videos(tmp_path, wanted) == [wanted[0], *wanted[2:]]
    shares = [missing_videos(tmp_path, wanted, (k, 3)) for k in (1, 2, 3)]
    assert sorted(each.file for share in shares for each in share) == sorted(
        each.file for each in wanted if each != wanted[1]
    )
    with pytest.raises(UserError, match="would have one file"):
        wanted_videos(["A dog", "a dog"])
    assert parse_share("2/3") == (2, 3)
    for bad in ("0/3", "4/3", "a/b", "1", "-1/2"):
        with pytest.raises(UserError, match="K/N"):
            parse_share(bad)


def test_prompts_of_the_info_file(tmp_path):
    info = tmp_path / "VBench_full_info.json"
    info.write_text(json.dumps([{"prompt_en": "b", "dimension": ["scene"]}, {"prompt_en": "a"}, {"prompt_en": "b"}]))
    assert read_prompts(info) == ["b", "a"]
    for content, told in (("{}", "list of prompts"), ("[1]", "prompt_en"), ("[", "not JSON"), ("[]", "list of")):
        info.write_text(content)
        with pytest.raises(UserError, match=told):
            read_prompts(info)


def test_videos_command_goes_on(tiny_folder, tmp_path, run):
    info, out = tmp_path / "info.json", tmp_path / "out"
    info.write_text(json.dumps([{"prompt_en": "a red circle"}, {"prompt_en": "a/b"}]))
    told = ["evaluate", "vbench-videos", tiny_folder / "system", "--info", info, "--out", out, "--samples", "2"]
    code, _, err = run(*told, "--batch", "2", "--share", "1/2")
    assert code == 0, err
    assert "2 of 4 videos to make" in err
    assert "'a/b'" in err
    first = out / "a red circle-0.mp4"
    kept = first.read_bytes()
    code, _, err = run(*told, "--batch", "3")
    assert code == 0, err
    assert "2 of 4 videos to make" in err
    made = sorted(path.name for path in out.glob("*.mp4"))
    assert len(made) == 4
    assert made[:2] == ["a red circle-0.mp4", "a red circle-1.mp4"]
    assert first.read_bytes() == kept
    assert kept != (out / made[1]).read_bytes()
    assert json.loads((out / "videos.json").read_text())["a red circle-1.mp4"] == "a red circle"
    first.unlink()  # made again in other company it is the same
    assert run(*told, "--batch", "2", "--share", "1/1")[0] == 0
    assert first.read_bytes() == kept


STUB = """
import json, os, sys, time
class VBench:
    def __init__(self, device, info, output):
        self.device, self.info, self.output = device, info, output
    def evaluate(self, videos_path, name, dimension_list):
        assert json.load(open(self.info)) and dimension_list == [name]
        if name == "color":
            print("out of memory"); sys.exit(3)
        if name == "scene":
            child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
            open(os.path.join(videos_path, "child"), "w").write(str(child)); time.sleep(60)
        if name != "human_action":
            score = len([f for f in os.listdir(videos_path) if f.endswith(".mp4")]) / 10
            path = os.path.join(self.output, name + "_eval_results.json")
            json.dump({name: [score, os.environ.get("PYTHONPATH", "none")]}, open(path, "w"))
"""


@pytest.fixture
def runner(tmp_path):
    """Interpreter with packages ``vbench`` and ``torch`` that behave like the real ones; info file, videos, results."""
    site = tmp_path / "site"
    for name, text in {
        "vbench": STUB,
        "torch": "class cuda:\n    is_available = staticmethod(lambda: False)\ndevice = str\n",
    }.items():
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(text)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    videos, info = tmp_path / "videos", tmp_path / "info.json"
    videos.mkdir()
    for n in range(3):
        (videos / f"a-{n}.mp4").write_bytes(b"")
    info.write_text('[{"prompt_en": "a"}]')
    return python, videos, info, tmp_path / "results"


def test_runner(runner, run):
    python, videos, info, out = runner
    told = []
    paths = run_dimensions(python, videos, info, out, ["object_class", "spatial_relationship"], tell=told.append)
    assert read_results(out) == {"object_class": 0.3, "spatial_relationship": 0.3}
    assert sorted(out.iterdir()) == sorted(paths)
    (videos / "a-3.mp4").write_bytes(b"")
    code, printed, err = run(
        *["evaluate", "vbench-run", videos, "--info", info, "--out", out, "--vbench-python", python],
        *["--dimensions", "object_class", "multiple_objects"],
    )
    assert code == 0, err
    assert "object_class: done before" in err
    assert read_results(out) == {"object_class": 0.3, "spatial_relationship": 0.3, "multiple_objects": 0.4}
    assert len(printed.splitlines()) == 2


def test_runner_that_fails(runner):
    python, videos, info, out = runner
    with pytest.raises(UserError, match="color ended with code 3; it said: out of memory"):
        run_dimensions(python, videos, info, out, ["color"])
    with pytest.raises(UserError, match=r"without human_action_eval_results\.json"):
        run_dimensions(python, videos, info, out, ["human_action"])
    with pytest.raises(UserError, match="no dimension 'beauty'"):
        run_dimensions(python, videos, info, out, ["beauty"])
    with pytest.raises(UserError, match="not a file"):
        run_dimensions(python.parent / "nowhere", videos, info, out)
    assert not list(out.iterdir())


def test_a_runner_that_takes_too_long_is_ended_with_its_children(runner):
    python, videos, info, out = runner
    with pytest.raises(UserError, match=r"took more than 1\.5 s"):
        run_dimensions(python, videos, info, out, ["scene"], seconds=1.5)
    child = int((videos / "child").read_text())
    for _ in range(50):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/status").read_text().split("State:")[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the runner's child is still there")
