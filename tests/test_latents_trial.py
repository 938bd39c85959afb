"""Folders of latents that are damaged, short or hostile: named in one line, and never read as less than they hold."""

import io
import json

import numpy as np
import pytest

from nd_jax.data.latents import LatentSource, write_latents
from nd_jax.errors import UserError

SHAPE = (6, 2, 4, 4, 3)
HEADER = 128  # bytes before the first number


@pytest.fixture
def folder(tmp_path):
    latents = np.random.Generator(np.random.Philox(0)).standard_normal(SHAPE, np.float32)
    return write_latents(tmp_path / "latents", [latents[:4], latents[4:]], [[f"clip {n}", "a clip"] for n in range(6)])


def saved(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros(SHAPE, np.float32))
    return file.getvalue()


def with_header(text: str) -> bytes:
    """A file whose header says what numpy would never write."""
    text = text.ljust(HEADER - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(4 * int(np.prod(SHAPE)))


def described(shape: str, kind: str = "'<f4'") -> bytes:
    return with_header(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: b"", "cannot be read"),
        (lambda content: content[:60], "cannot be read"),
        (lambda content: content[:HEADER], "cannot be read"),
        (lambda content: content[: len(content) // 2], "cannot be read"),
        (lambda content: content[:-1], "cannot be read"),
        (lambda content: content + b"x", "expected 2432 for 6 clips"),
        (lambda content: content[:900] + b"x" + content[901:], "was changed since it was written"),
        (lambda content: zipped(), "cannot be read"),
        (lambda content: b"\x80\x04\x95pickled", "cannot be read"),
        (lambda content: saved(np.array([{}] * 6), allow_pickle=True), "cannot be read"),
        (lambda content: saved(np.zeros(SHAPE)), "float64 [6, 2, 4, 4, 3], expected float32"),
        (lambda content: saved(np.zeros(SHAPE[1:], np.float32)), "[2, 4, 4, 3], expected float32 [N"),
        (lambda content: saved(np.zeros((5, *SHAPE[1:]), np.float32)), "5 clips and captions for 6"),
        (lambda content: described("(6, 2, 4, 4, 999999999999)"), "cannot be read"),
        (lambda content: described(f"(6, 2, 4, 4, {1 << 62})"), "cannot be read"),
        (lambda content: described(f"(6, 2, 4, 4, {1 << 80})"), "cannot be read"),
        (lambda content: described("(6, 2, 4, -4, -3)"), "latents.npy"),
        (lambda content: described("(0, 2, 4, 4, 3)"), "latents.npy"),
        (lambda content: described("(True, 2, 4, 4, 3)"), "latents.npy"),
        (lambda content: described("'abcde'"), "cannot be read"),
        (lambda content: described("(6, 2, 4, 4, 3)", "'|O'"), "cannot be read"),
        (lambda content: described("(6, 2, 4, 4, 3)", "[('a', '<f4')]"), "expected float32"),
        (lambda content: described("__import__('os').abort()"), "cannot be read"),
        (lambda content: described("(" * 90), "cannot be read"),
    ],
)
def test_damaged_table_is_named(folder, change, told):
    path = folder / "latents.npy"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"nd-jax data latents") as caught:
        LatentSource(folder)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b'[["a", "b"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"0": ["a"]}', "expected a list of captions"),
        (json.dumps([["a", "b"]] * 5 + [[]]).encode(), "expected a list of captions"),
        (json.dumps([["a", 1]] * 6).encode(), "expected a list of captions"),
        (json.dumps([["a", "b"]] * 5).encode(), "6 clips and captions for 5"),
        (json.dumps([["a", "b"]] * 5 + [["a"]]).encode(), "1 to 2 captions a clip, expected as many of each"),
        (json.dumps([["a", "b"]] * 6).encode(), "was changed since it was written"),
    ],
)
def test_damaged_captions_are_named(folder, content, told):
    (folder / "captions.json").write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.json|captions for") as caught:
        LatentSource(folder)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"clips": 7}, "holds 6 clips, info.json says 7"),
        ({"clips": None}, "info.json says None"),
        ({"crc32": 5}, "crc32 is 5"),
        ({"crc32": {"latents.npy": "0"}}, "was changed"),
    ],
)
def test_description_that_differs_is_named(folder, change, told):
    path = folder / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=told):
        LatentSource(folder)


@pytest.mark.parametrize("name", ["latents.npy", "captions.json", "info.json"])
def test_missing_and_linked_files_are_named(folder, name):
    path = folder / name
    moved = path.rename(folder / "elsewhere")
    with pytest.raises(UserError, match=name):
        LatentSource(folder)
    path.symlink_to(moved)
    with pytest.raises(UserError, match="symbolic link"):
        LatentSource(folder)


def test_folders_without_checksums_are_read(folder):
    """Those that were written before there were any."""
    (folder / "info.json").write_text(json.dumps({"clips": 6, "codec": "codec"}))
    assert len(LatentSource(folder)) == 12


def test_numbers_that_are_not_finite_are_named_wherever_they_are_met(folder, tmp_path):
    import tiny_system

    from nd_jax.workflow import with_statistics

    (folder / "info.json").write_text(json.dumps({"clips": 6}))
    source = LatentSource(folder)
    latents = np.array(source.latents)
    for bad in (np.nan, np.inf):
        latents[4, 1, 2, 3, 1] = bad
        np.save(folder / "latents.npy", latents)
        source = LatentSource(folder)
        assert np.isfinite(source[3]["latents"]).all()
        with pytest.raises(UserError, match=r"clip 4 of .*latents: a number is NaN or infinite"):
            source[4]
        with pytest.raises(UserError, match="clips 3 to 5: a number is NaN"):
            with_statistics(tiny_system.CONFIG.causal_video_vae, source.latents, chunk=3)
        with pytest.raises(UserError, match="clip 2 and later ones"):
            write_latents(tmp_path / "other", [latents[:2], latents[2:]], [["a"]] * 6)
    assert not (tmp_path / "other").exists()
