"""`nd-jax verify`: every golden case passes, every kind of damage is noticed."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from conftest import GOLDEN

from nd_jax.cli import main
from nd_jax.errors import UserError
from nd_jax.verification.cases import Case, find_cases
from nd_jax.verification.kinds import kind_of
from nd_jax.verification.rows import Status
from nd_jax.verification.tolerances import BFLOAT16, TABLE, Tolerance, tolerance
from nd_jax.verify import run, verify, verify_case

TEXT = ("dt5_", "context_adapter", "clip_text_")  # run by test_text_networks
FIRST_FRAME = ("sdxl_unet", "image_vae", "lcm_scheduler", "quicksrnet_")  # by test_first_frame_networks
NAMES = [case.name for case in find_cases(GOLDEN)]


@pytest.fixture
def cases(tmp_path):
    """Function that copies golden cases to a folder of their own and returns it."""

    def copy(*names):
        for name in names:
            shutil.copytree(GOLDEN / name, tmp_path / "golden" / name)
        return tmp_path / "golden"

    return copy


def change(path, edit):
    """Rewrite an npz file with ``edit(arrays)`` applied."""
    arrays = dict(np.load(path, allow_pickle=False))
    arrays = edit(arrays) or arrays
    np.savez(path, **arrays)


def rename(folder, old, new):
    """Give a subcase another name everywhere."""
    for file in ("inputs.npz", "outputs.npz"):
        change(
            folder / file,
            lambda arrays: {
                (new + key[len(old) :] if key.startswith(old + "/") else key): array for key, array in arrays.items()
            },
        )
    for file in ("meta.json", "config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(f'"{old}"', f'"{new}"'))


SLOW = ("generation", "mmdit", "native_vae", "training")
"""Cases whose networks have golden tests of their own, so that here they may wait for the heavier checks."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.heavy if name in SLOW else ())
        for name in NAMES
        if not name.startswith((*TEXT, *FIRST_FRAME))
    ],
)
def test_golden(name):
    rows = list(verify_case(Case(GOLDEN / name, GOLDEN)))
    assert rows
    assert [row for row in rows if row.status is not Status.PASS] == []


def test_every_recorded_array_has_a_tolerance():
    for case in find_cases(GOLDEN):
        kind = kind_of(case)
        assert kind is not None
        for subcase in case.subcases():
            assert [name for name in subcase.outputs if tolerance(kind, subcase.name, name) is None] == []


def test_tolerances_are_not_looser_than_recommended():
    loosest = {
        "asymmetric_vae": 2e-4,
        "clip_text": 2e-5,
        "context_adapter": 1e-5,
        "generation": 1.0,  # grey levels
        "image_vae": 1.0,  # grey levels
        "lcm_scheduler": 1e-4,
        "mmdit": 2e-4,  # sinusoids; predictions below
        "native_vae": 5e-5,
        "pyramid_ops": 1e-5,
        "quicksrnet": 2e-5,
        "scheduler": 1e-3,
        "t5": 5e-5,
        "training": 1e-4,
        "unet": 5e-4,  # guidance embedding
    }
    assert {kind: max(limit for _, limit in rules) for kind, rules in TABLE.items()} == loosest
    for kind, output, limit in (
        ("mmdit", "pred/0", 1e-4),
        ("mmdit", "grad/proj_out.bias", 1e-5),
        ("mmdit", "attention_mask/0", 0),
        ("generation", "latents", 5e-4),
        ("asymmetric_vae", "video", 1e-4),
        ("training", "noisy/0/0", 1e-6),
        ("scheduler", "prev_sample", 1e-6),
        ("pyramid_ops", "uint8", 0),
        ("image_vae", "image", 2e-5),
        ("image_vae", "moments", 2e-5),
        ("lcm_scheduler", "alphas_cumprod", 1e-6),
        ("lcm_scheduler", "from_4_of_50", 0),
        ("unet", "noise_pred", 2e-5),
        ("unet", "hidden_states", 2e-5),
        ("unet", "act/mid", 1e-4),
        ("unet", "latent", 3e-4),
        ("unet", "time_ids_sinusoid", 5e-5),
    ):
        assert tolerance(kind, "any", output).limit == limit
    assert tolerance("scheduler", "step_bf16", "prev_sample").limit == 0
    assert tolerance("lcm_scheduler", "tables", "c_skip") == Tolerance(1e-5, relative=True)
    assert not tolerance("lcm_scheduler", "tables", "c_out").relative


@pytest.mark.parametrize(
    "damage",
    [
        lambda y: y + np.float32(2e-5) * (np.arange(y.size).reshape(y.shape) == 5),
        lambda y: np.where(np.arange(y.size).reshape(y.shape) == 5, np.nan, y),
        lambda y: y[:, :-1],
    ],
    ids=["one number", "nan", "shape"],
)
def test_a_changed_output_fails(cases, capsys, damage):
    folder = cases("context_adapter", "context_adapter_variant")
    change(folder / "context_adapter/outputs.npz", lambda arrays: arrays.update({"b1/y": damage(arrays["b1/y"])}))
    assert main(["verify", str(folder)]) == 1
    assert "3 arrays pass, 1 fail" in capsys.readouterr().out
    (failed,) = (row for row in verify(folder) if row.status is Status.FAIL)
    assert (failed.case, failed.subcase, failed.output) == ("context_adapter", "b1", "y")


def test_a_changed_weight_fails(cases):
    folder = cases("context_adapter")
    path = folder / "context_adapter/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(1).tobytes()
    path.write_bytes(data)
    assert run(folder) == 1


def test_a_folder_that_is_a_case(cases, capsys):
    assert main(["verify", str(cases("context_adapter") / "context_adapter")]) == 0
    assert "2 arrays pass, 0 fail" in capsys.readouterr().out


def test_what_nobody_recomputes_is_listed_and_counted(cases, capsys):
    folder = cases("context_adapter")
    change(folder / "context_adapter/outputs.npz", lambda arrays: arrays.update({"b1/new": np.zeros(3)}))
    later = folder / "a_later_case"
    shutil.copytree(folder / "context_adapter", later)
    (later / "config.json").write_text('{"_class_name": "SomethingLater"}')
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "2 arrays pass, 0 fail, 1 not compared; 1 cases without a network" in out
    assert "a_later_case" in out


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("context_adapter", "b1", "seed9_portrait"),
        ("clip_text_gelu", "pad_eos", "prompt"),
        ("pyramid_ops", "past_3_cfg", "history"),
        ("scheduler", "stages2_gamma_half", "two"),
    ],
)
def test_subcases_may_have_any_name(cases, name, old, new):
    folder = cases(name)
    rename(folder / name, old, new)
    rows = verify(folder)
    assert {row.status for row in rows} == {Status.PASS}
    assert any(row.subcase == new for row in rows)


def test_bfloat16_has_tolerances_of_its_own(cases):
    folder = cases("context_adapter", "scheduler")
    rows = verify(folder, "bfloat16")
    assert [row.status for row in rows] == [Status.PASS] * 2
    assert all(row.tolerance.relative and 1e-3 < row.error < BFLOAT16["context_adapter"][0][1] for row in rows)
    change(folder / "context_adapter/outputs.npz", lambda arrays: {k: v * 1.05 for k, v in arrays.items()})
    assert {row.status for row in verify(folder, "bfloat16")} == {Status.FAIL}


def refused(folder, message, capsys):
    """The command says so in one line and exits with 2."""
    assert main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_pickles_are_refused(cases, capsys):
    folder = cases("context_adapter")
    path = folder / "context_adapter/outputs.npz"
    np.savez(path, **{"b1/y": np.array([{"a": 1}], dtype=object)}, allow_pickle=True)
    refused(folder, "pickled objects are refused", capsys)


def test_arrays_larger_than_their_file_are_refused(cases, capsys):
    folder = cases("context_adapter")
    with (
        zipfile.ZipFile(folder / "context_adapter/inputs.npz", "w") as archive,
        archive.open("b1/x.npy", "w") as stream,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
        np.lib.format.write_array_header_1_0(stream, header)
    refused(folder, "claims shape (1099511627776,)", capsys)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("outputs.npz", b"PK not really", "not a readable npz file"),
        ("meta.json", b"{", "is not JSON"),
        ("meta.json", b"[]", "expected an object"),
        ("config.json", b'{"_class_name": "ContextAdapter", "activation_fn": "cube"}', "activation_fn"),
        ("weights.safetensors", b"\x00" * 8, "weights.safetensors"),
    ],
)
def test_damaged_files(cases, capsys, file, content, message):
    folder = cases("context_adapter")
    (folder / "context_adapter" / file).write_bytes(content)
    refused(folder, message, capsys)


@pytest.mark.parametrize("file", ["config.json", "meta.json", "inputs.npz", "outputs.npz", "weights.safetensors"])
def test_missing_files(cases, capsys, file):
    folder = cases("context_adapter")
    (folder / "context_adapter" / file).unlink()
    refused(folder, file, capsys)


def test_a_malformed_case_does_not_hide_the_others(cases, capsys):
    folder = cases("context_adapter", "context_adapter_variant")
    (folder / "context_adapter/outputs.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"context_adapter/outputs\.npz"):
        run(folder)
    assert "2 arrays pass" in capsys.readouterr().out


def test_a_missing_input_is_named(cases, capsys):
    folder = cases("context_adapter")
    change(folder / "context_adapter/inputs.npz", lambda arrays: {"b1/z": arrays["b1/x"]})
    refused(folder, "subcase b2: input 'x' is missing", capsys)


def test_no_path_leads_out_of_the_folder(cases, tmp_path, capsys):
    folder = cases("training")
    meta = json.loads((folder / "training/meta.json").read_text())
    (folder / "training/meta.json").write_text(json.dumps(meta | {"weights_of_case": "../mmdit"}))
    refused(folder, "'../mmdit' is not a case name", capsys)

    folder = cases("context_adapter")
    shutil.rmtree(folder / "training")
    shutil.move(folder / "context_adapter/outputs.npz", tmp_path / "outputs.npz")
    (folder / "context_adapter/outputs.npz").symlink_to(tmp_path / "outputs.npz")
    refused(folder, "leads out of", capsys)


def test_owner_of_the_weights_has_to_be_there(cases, capsys):
    refused(cases("training"), "golden case training needs the case 'mmdit'", capsys)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_cases(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / name, str(tmp_path / name), capsys)
