"""The preset of the wider world: shapes_base's networks and runs at twice the width."""

from nd_jax.recipes.preset import load_preset


def test_the_wide_world_differs_in_its_width_alone():
    """Its systems are shapes_base's, so that its teacher can start from the one that comes with the package; every way
    of distilling steps makes equally many updates, and every learning rate ends with them."""
    base, wide = load_preset("shapes_base"), load_preset("shapes_wide")
    assert wide.system == base.system
    assert (wide.world, wide.latent_size) == ("64x128", (5, 8, 16))
    ways = [wide.run(name) for name in ("student", "progressive", "mean_flow", "adversarial")]
    assert len({run.loop.steps for run in ways}) == 1
    for run in ways:
        assert run.recipe.steps == (1, 1, 1)
        assert run.recipe.optim.decay_steps == run.loop.steps
    student = ways[0].recipe
    assert student.fake_optim.decay_steps == student.fake_updates * ways[0].loop.steps
    assert ways[1].recipe.round_steps * ways[1].recipe.rounds == ways[1].loop.steps
