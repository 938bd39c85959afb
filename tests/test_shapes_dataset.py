"""The TFDS builder without TensorFlow, and the Grain pipeline: the same bytes, every epoch complete, resumable."""

import json
import subprocess
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nd_jax.data.pipeline import batches
from nd_jax.data.shapes import Builder, config_for, prepare
from nd_jax.data.source import ShapesSource
from nd_jax.data.world import SPLITS, WORLDS
from nd_jax.errors import UserError

WORLD = WORLDS["64x64"]


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"), "64x64", seed=3, train=30, evaluate=6)


def test_dataset_holds_what_the_source_draws(builder):
    assert builder.info.file_format.value == "array_record"
    for split in SPLITS:
        stored = builder.as_data_source(split)
        source = ShapesSource(WORLD, split, 30 if split == "train" else 6, seed=3)
        assert len(stored) == len(source)
        assert sorted(int(stored[k]["index"]) for k in range(len(stored))) == list(range(len(source)))
        for k in range(4):
            drawn = source[int(stored[k]["index"])]
            np.testing.assert_array_equal(stored[k]["video"], drawn["video"])
            np.testing.assert_array_equal(stored[k]["labels"], drawn["labels"])
            assert stored[k]["caption"].decode() == drawn["caption"]


def test_preparing_twice_gives_the_same_order_and_reuses_what_is_there(builder, tmp_path):
    again = prepare(tmp_path, "64x64", seed=3, train=30, evaluate=6)
    splits = [one.as_data_source("train") for one in (builder, again)]
    order = [[int(split[k]["index"]) for k in range(30)] for split in splits]
    assert order[0] == order[1]
    assert order[0] != sorted(order[0])
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}
    prepare(tmp_path, "64x64", seed=3, train=30, evaluate=6)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}


def test_other_settings_live_in_other_folders():
    names = {config_for("64x64", seed=seed, train=train).name for seed in (0, 1) for train in (30, 60)}
    assert len(names) == 4
    assert set(Builder.builder_configs) == set(WORLDS)
    with pytest.raises(UserError, match="two_objects"):
        config_for("three_objects")


def test_tensorflow_stays_out(tmp_path):
    """In a fresh process, so that nothing else can have imported it."""
    code = (
        "import sys\n"
        "from nd_jax.data.shapes import prepare\n"
        f"data = prepare({str(tmp_path)!r}, 'two_objects', train=2, evaluate=1).as_data_source('train')\n"
        "print(len(data), data[0]['video'].shape, data[0]['labels'].shape, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 (33, 64, 128, 3) (2, 5) False"


def joined(lists):
    return [item for part in lists for item in part]


def indices(iterator, count):
    return [next(iterator)["index"].tolist() for _ in range(count)]


def test_batches_from_tfds_and_from_drawing(builder):
    for source in (builder.as_data_source("train"), ShapesSource(WORLD, "train", 30)):
        batch = next(batches(source, 4))
        assert batch["video"].shape == (4, 33, 64, 64, 3)
        assert batch["video"].dtype == np.uint8
        assert batch["labels"].shape == (4, 1, 5)
        assert all(isinstance(caption, str) for caption in batch["caption"])


class Numbers:
    """A source that costs nothing."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"index": np.int64(index)}


def test_epochs_are_complete_different_and_endless():
    iterator = batches(Numbers(24), 6, keys=("index",), seed=1)
    epochs = [joined(indices(iterator, 4)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert joined(indices(batches(Numbers(24), 6, keys=("index",), seed=1), 4)) == epochs[0]
    assert indices(batches(Numbers(24), 6, keys=("index",), seed=2), 1) != [epochs[0][:6]]
    ordered = batches(Numbers(5), 4, keys=("index",), shuffle=False)
    assert indices(ordered, 3) == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


def test_processes_share_an_epoch_without_overlap():
    parts = [batches(Numbers(25), 4, keys=("index",), process_index=k, process_count=3) for k in range(3)]
    for _ in range(3):
        seen = joined(joined(indices(part, 2)) for part in parts)
        assert len(set(seen)) == len(seen) == 24


def test_a_checkpoint_resumes_exactly(tmp_path):
    def make():
        return batches(Numbers(23), 5, keys=("index",), seed=6)

    iterator = make()
    indices(iterator, 7)
    saved = json.loads(json.dumps(iterator.get_state()))
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        following = indices(iterator, 9)
        resumed = make()
        manager.restore(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert indices(resumed, 9) == following
    resumed.set_state(saved)
    assert indices(resumed, 9) == following


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 4}, {"process_count": 2}, {"workers": 1}])
def test_a_checkpoint_of_other_settings_is_refused(change):
    settings = {"batch_size": 5, "keys": ("index",)}
    state = batches(Numbers(23), **settings).get_state()
    name = next(iter(change))
    with pytest.raises(UserError, match=name):
        batches(Numbers(23), **(settings | change)).set_state(state)


@pytest.mark.heavy
def test_worker_processes_give_the_same_batches_and_resume():
    def make(workers):
        return batches(ShapesSource(WORLD, "train", 20), 4, keys=("index",), seed=2, workers=workers)

    expected = indices(make(0), 9)
    iterator, resumed = make(2), make(2)
    try:
        assert indices(iterator, 4) == expected[:4]
        resumed.set_state(json.loads(json.dumps(iterator.get_state())))
        assert indices(resumed, 5) == expected[4:]
    finally:
        iterator.close()
        resumed.close()


def test_bad_sizes_are_refused():
    for make in (
        lambda: batches(Numbers(8), 0),
        lambda: batches(Numbers(8), 2, process_index=2, process_count=2),
        lambda: batches(Numbers(1), 1, process_count=2),
        lambda: batches(Numbers(0), 1),
        lambda: batches(Numbers(8), 1, workers=-1),
    ):
        with pytest.raises(UserError, match="expected"):
            make()
