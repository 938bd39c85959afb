"""The loop on a toy recipe: meshes agree, nothing is lost, and what cannot go on says so in one line."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy
from training_toy import assert_same, numbers

from nd_jax.errors import UserError
from nd_jax.training.checkpoint import CheckpointStore, load_tree, read_record
from nd_jax.training.compiles import CompileCounter
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Every
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.metrics import TrainingDiverged, read_metrics
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program

STEPS = 10
SHARDED = make_mesh(MeshConfig(data=2, fsdp=4))
OTHER = make_mesh(MeshConfig(data=4, fsdp=2))
ONE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with toy.compiled_once(tmp_path_factory.mktemp("compiled")) as environment:
        yield environment


def curve(folder, names=("loss", "grad_norm")):
    return [(row["step"], *(row[name] for name in names)) for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on the 2 x 4 mesh that nothing interrupts: state, iterator position and folder."""
    folder = tmp_path_factory.mktemp("whole")
    stream = toy.batches()
    outcome = toy.run(folder, steps=STEPS, mesh=SHARDED, stream=stream)
    return numbers(outcome.state), stream.get_state(), folder, outcome


def test_one_compilation_and_a_falling_loss(whole):
    _, _, folder, outcome = whole
    assert (outcome.step, outcome.reason, outcome.finished) == (STEPS, "steps", True)
    assert (outcome.step_compilations, outcome.other_compilations) == (1, 0)
    losses = [loss for _, loss in curve(folder, ("loss",))]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_the_step_compiles_once_by_an_outside_count(whole, tmp_path):
    """Counted by JAX's own events, a checkpoint in between: after the first step there are none."""
    counts = []
    with CompileCounter() as counter:
        toy.run(tmp_path, steps=9, mesh=SHARDED, callbacks=[Every(1, lambda *_: counts.append(counter.count))])
    assert counts[0] > 0
    assert counts == counts[:1] * 9


def test_eight_devices_agree_with_one(whole, tmp_path):
    expected, _, folder, _ = whole
    outcome = toy.run(tmp_path, steps=STEPS, mesh=ONE)
    found = numbers(outcome.state)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(curve(tmp_path), curve(folder), rtol=1e-4)


def test_with_the_hooks_only_weights_travel_whole():
    """Left to itself the compiler gathers activations ([8, 16] here) and splits the layers' products instead."""
    recipe = toy.Toy(hooks=sharding_hooks(SHARDED, toy.RULES))
    text = Program(recipe, SHARDED, jax.random.key(0)).compile_step().as_text()
    assert set(re.findall(r"= (\S+?)\{\S* all-gather\(", text)) == {"f32[1,16,32]", "f32[1,32,16]", "f32[16,16]"}
    assert " all-to-all(" not in text


def test_interrupted_politely_and_resumed_is_bit_equal(whole, tmp_path):
    """SIGTERM between two checkpoints: saved where it stood, and on with every number and the iterator."""
    expected, position, folder, _ = whole

    def strike(step, _):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    first = toy.run(tmp_path, steps=STEPS, mesh=SHARDED, callbacks=[Every(1, strike)])
    assert (first.step, first.reason, first.finished) == (6, "SIGTERM", False)
    assert signal.getsignal(signal.SIGTERM) is before
    stream = toy.batches()
    second = toy.run(tmp_path, steps=STEPS, mesh=SHARDED, stream=stream)
    assert second.reason == "steps"
    assert_same(numbers(second.state), expected)
    assert stream.get_state() == position
    assert curve(tmp_path) == curve(folder)
    assert second.seconds > first.seconds


@pytest.mark.parametrize("mesh", [OTHER, ONE], ids=["4x2", "1"])
def test_restoring_onto_another_mesh_is_exact(whole, mesh):
    expected, position, folder, _ = whole
    stream = toy.batches()
    program = Program(toy.Toy(), mesh, jax.random.key(1))
    with CheckpointStore(folder, {"preset": "toy"}) as store:
        state, record = store.restore(program.state, stream)
    assert_same(numbers(state), expected)
    assert stream.get_state() == position
    assert record["step"] == STEPS
    for (name, leaf), (_, wanted) in zip(named_leaves(state), named_leaves(program.state), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name


def test_from_mesh_to_mesh_and_back_nothing_changes(whole, tmp_path):
    """Restored on one device, saved there, restored on eight."""
    expected, position, folder, _ = whole
    stream = toy.batches()
    with CheckpointStore(folder, {"preset": "toy"}) as store:
        state, _ = store.restore(Program(toy.Toy(), ONE, jax.random.key(1)).state, stream)
    with CheckpointStore(tmp_path, {"preset": "toy"}) as store:
        store.save(STEPS, state, stream)
    stream = toy.batches()
    with CheckpointStore(tmp_path, {"preset": "toy"}) as store:
        state, _ = store.restore(Program(toy.Toy(), SHARDED, jax.random.key(2)).state, stream)
    assert_same(numbers(state), expected)
    assert stream.get_state() == position


def test_one_part_of_a_state_can_be_read_alone(whole):
    expected, _, folder, _ = whole
    ema = load_tree(folder)
    assert isinstance(ema["out"]["scale"], np.ndarray)
    assert_same(dict(named_leaves(ema)), {k.removeprefix("ema/"): v for k, v in expected.items() if k[:4] == "ema/"})
    sharding = jax.sharding.NamedSharding(OTHER, jax.sharding.PartitionSpec())
    up = load_tree(folder, "params/blocks/up", sharding=sharding)
    assert up["kernel"].sharding == sharding
    np.testing.assert_array_equal(up["kernel"], expected["params/blocks/up/kernel"])
    with pytest.raises(UserError, match=r"no part 'frozen': expected one of .*ema"):
        load_tree(folder, "frozen")
    with pytest.raises(UserError, match="does not hold a checkpoint"):
        load_tree(folder / "nothing")
    with pytest.raises(UserError, match="the checkpoint of step 3"):
        load_tree(folder, step=3)


def test_a_finished_run_has_nothing_to_do(whole):
    expected, _, folder, _ = whole
    lines = curve(folder)
    with CompileCounter() as compiles:
        outcome = toy.run(folder, steps=STEPS, mesh=SHARDED)
    assert (outcome.reason, outcome.step_compilations, compiles.count) == ("steps", 0, 0)
    assert_same(numbers(outcome.state), expected)
    assert curve(folder) == lines


def test_only_the_newest_checkpoints_stay(whole):
    _, _, folder, _ = whole
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()) == ["10", "8"]


def test_leftovers_of_a_killed_save_are_cleaned(tmp_path):
    toy.run(tmp_path, steps=4, mesh=ONE)
    leftover = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    leftover.mkdir()
    outcome = toy.run(tmp_path, steps=5, mesh=ONE)
    assert outcome.step == 5
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"preset": "another"}, "belongs to preset 'toy', this run has 'another'"),
        ({"pinned": {"workers": 2}}, "belongs to workers None, this run has 2"),
        (
            {"recipe": toy.Toy(depth=2)},
            r"ema/blocks/down/kernel is float32 \[3, 32, 16\], this run expects .*\[2, 32, 16\]",
        ),
        ({"recipe": toy.Toy(optim=toy.OptimConfig(clip_norm=None))}, "opt_state/.* absent"),
    ],
    ids=["preset", "pinned", "shapes", "optimizer"],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(whole, options, told):
    _, _, folder, _ = whole
    with pytest.raises(UserError, match=told) as error:
        toy.run(folder, steps=2 * STEPS, mesh=SHARDED, **options)
    assert "\n" not in str(error.value)
    assert read_record(folder)["step"] == STEPS


class Spoilt:
    """A stream whose examples go bad at a step, or that ends there."""

    def __init__(self, step, value=None):
        self.taken, self.step, self.value = 0, step, value

    def __next__(self):
        self.taken += 1
        if self.taken == self.step and self.value is None:
            raise StopIteration
        x = np.full((toy.BATCH, toy.WIDTH), self.value if self.taken == self.step else 1.0, np.float32)
        return {"x": x}

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


def test_a_non_finite_metric_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"step 6: metric loss is nan.*checkpoint of step 5 is kept") as error:
        toy.run(tmp_path, steps=20, mesh=ONE, stream=Spoilt(6, np.nan), save_every=5)
    assert (error.value.step, error.value.metric, error.value.kept) == (6, "loss", 5)
    assert read_record(tmp_path)["step"] == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_tree(tmp_path, "params")))
    # Any iterator with a JSON state is stored with the checkpoint.
    stream = Spoilt(100)
    toy.run(tmp_path, steps=7, mesh=ONE, stream=stream)
    assert stream.taken == 7


def test_a_non_finite_state_is_never_saved(tmp_path):
    """The bad step is itself a checkpoint's, and the host runs ahead of the device."""
    with pytest.raises(TrainingDiverged, match=r"step 5: .*no checkpoint was written yet"):
        toy.run(tmp_path, steps=20, mesh=ONE, stream=Spoilt(5, np.inf), save_every=5)
    with pytest.raises(UserError, match="does not hold a checkpoint"):
        read_record(tmp_path)


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(UserError, match="the data ended after step 2"):
        toy.run(tmp_path, steps=20, mesh=ONE, stream=Spoilt(3))


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"x": np.zeros((8, toy.WIDTH), np.float32)}, r"leaf x: found float32 \[8, 16\], expected float32 \[16, 16\]"),
        ({"x": np.zeros((16, toy.WIDTH), np.float64)}, r"leaf x: found float64 \[16, 16\]"),
        ({"y": np.zeros(3)}, "leaf x: found nothing"),
    ],
)
def test_a_batch_that_is_not_as_promised_names_the_leaf(batch, told):
    program = Program(toy.Toy(), ONE, jax.random.key(0))
    with pytest.raises(UserError, match=told):
        program.put(batch)


def test_the_wall_clock_budget_counts_earlier_parts(tmp_path):
    outcome = toy.run(tmp_path, steps=10**6, mesh=ONE, max_seconds=0.5, save_every=10**6)
    assert outcome.reason == "seconds"
    assert 0 < outcome.step < 10**6
    assert read_record(tmp_path)["step"] == outcome.step
    again = toy.run(tmp_path, steps=10**6, mesh=ONE, max_seconds=0.5)
    assert (again.step, again.reason, again.step_compilations) == (outcome.step, "seconds", 0)


def test_a_step_that_changes_the_state_or_forgets_to_count_is_a_mistake(tmp_path):
    class Growing(toy.Toy):
        def step(self, state, batch):
            state, metrics = super().step(state, batch)
            return state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)), metrics

    with pytest.raises(TypeError, match=r"state leaf params/blocks/down/kernel from .*float32.* into .*bfloat16"):
        _ = Program(Growing(), ONE, jax.random.key(0)).metric_names


def test_settings_are_stored_for_people(tmp_path):
    toy.run(tmp_path, steps=1, mesh=ONE, settings={"rate": 0.1, "shape": (1, 2)})
    record = read_record(tmp_path)
    assert record["identity"] == {"preset": "toy"}
    assert record["settings"] == json.loads(json.dumps({"rate": 0.1, "shape": (1, 2)}))
    assert record["step"] == 1
