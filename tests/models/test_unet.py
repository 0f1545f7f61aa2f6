"""The U-Net: DDPM's parameter count, its options, and what must hold at the start and under rematerialisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.unet import UNet, position_embedding
from tests.models.tiny_networks import jit, random_parameters

TINY = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
ONE_LEVEL = {"channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
TIME = jnp.array([3.0, 700.0])


def shapes_of(network, *inputs):
    return jax.eval_shape(network.init, KEY, *inputs)


def random_network(*inputs, **settings):
    """A tiny U-Net, its compiled apply and random parameters."""
    network = UNet(3, **TINY | settings)
    return network, jit(network.apply), random_parameters(network, *inputs, scale=0.2)


def count(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_ddpm_cifar10_has_exactly_35746307_parameters():
    network = UNet(3, channels=128, channel_multipliers=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,))
    assert count(shapes_of(network, jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))) == 35_746_307


@pytest.mark.parametrize("patch_size", [1, 2])
def test_output_has_the_image_size_and_is_exactly_zero_at_the_start(patch_size):
    network = UNet(6, **ONE_LEVEL | {"patch_size": patch_size})
    output, variables = jit(network.init_with_output)(KEY, X, TIME)
    assert output.dtype == jnp.float32
    np.testing.assert_array_equal(output, jnp.zeros((2, 8, 8, 6)))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(variables))


def test_attention_sits_at_the_resolutions_asked_for_and_in_the_middle():
    params = shapes_of(UNet(3, **TINY), X, TIME)["params"]
    assert {name for name, block in params.items() if "attention" in block} == {
        "down_1_0", "middle_0", "up_1_0", "up_1_1",
    }  # fmt: skip
    folded = shapes_of(UNet(3, **TINY | {"patch_size": 2}), X, TIME)["params"]  # 8 pixels fold into 4, then 2
    assert {name for name, block in folded.items() if "attention" in block} == {
        "down_0_0", "middle_0", "up_0_0", "up_0_1",
    }  # fmt: skip


def test_attention_by_level_does_not_depend_on_the_image():
    settings = TINY | {"attention_levels": (0,), "attention_resolutions": (4,)}
    for size in (8, 16):
        params = shapes_of(UNet(3, **settings), jnp.zeros((1, size, size, 3)), jnp.zeros(1))["params"]
        assert {name for name, block in params.items() if "attention" in block} == {
            "down_0_0", "middle_0", "up_0_0", "up_0_1",
        }  # fmt: skip


def test_stable_diffusion_1_has_exactly_859520964_parameters():
    network = UNet(
        4,
        channels=320,
        channel_multipliers=(1, 2, 4, 4),
        attention_levels=(0, 1, 2),
        num_heads=8,
        context_dim=768,
        norm_epsilon=1e-5,
        frequency_shift=0.0,
        cosine_first=True,
    )
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), None, jnp.zeros((1, 77, 768))
    assert count(shapes_of(network, *inputs)) == 859_520_964


def test_epsilon_and_time_embedding_are_options():
    """Each changes the result, as parity with another library's network hangs on it."""
    variables = random_parameters(UNet(3, **ONE_LEVEL), X, TIME)
    plain = jit(UNet(3, **ONE_LEVEL).apply)(variables, X, TIME)
    for option in ({"norm_epsilon": 1.0}, {"frequency_shift": 0.0}, {"cosine_first": True}):
        other = jit(UNet(3, **ONE_LEVEL, **option).apply)(variables, X, TIME)
        assert float(jnp.abs(other - plain).max()) > 1e-3, option


def test_heads_by_number_or_by_size_are_the_same_network():
    variables = random_parameters(UNet(3, **ONE_LEVEL), X, TIME, scale=1.0)
    four, two_wide, one = (
        jit(UNet(3, **ONE_LEVEL, **heads).apply)(variables, X, TIME)
        for heads in ({"num_heads": 4}, {"head_dim": 2}, {"num_heads": 1})
    )
    np.testing.assert_allclose(two_wide, four, rtol=1e-5, atol=1e-5)
    assert not np.allclose(one, four, rtol=1e-2, atol=1e-2)


def test_labels_and_the_null_label():
    label = jnp.array([0, 2])
    network, apply, variables = random_network(X, TIME, label, num_classes=3)
    assert variables["params"]["label_embedding"]["embedding"].shape == (4, 32)
    labelled = apply(variables, X, TIME, label)
    unconditional = apply(variables, X, TIME, None)
    np.testing.assert_array_equal(apply(variables, X, TIME, jnp.array([3, 3])), unconditional)
    for i in range(2):
        assert not np.allclose(labelled[i], unconditional[i], atol=1e-3)
    with pytest.raises(ValueError, match="num_classes is 0"):
        shapes_of(UNet(3, **TINY), X, TIME, label)
    assert "label_embedding" not in shapes_of(UNet(3, **TINY), X, TIME)["params"]


def test_every_image_sees_its_own_time_label_and_context():
    """Swapping the images of a batch with all they are told swaps the results."""
    label, context = jnp.array([0, 2]), jax.random.normal(KEY, (2, 4, 6))
    inputs = (X, TIME, label, context)
    _, apply, variables = random_network(*inputs, num_classes=3, context_dim=6)
    output = apply(variables, *inputs)
    np.testing.assert_allclose(apply(variables, *(a[::-1] for a in inputs)), output[::-1], atol=2e-4, rtol=1e-4)
    for i in range(1, 4):  # time, label, context: each matters
        changed = [a[::-1] if i == j else a for j, a in enumerate(inputs)]
        assert not np.allclose(apply(variables, *changed), output, atol=1e-2)


def test_the_pooled_context_reaches_every_residual_block():
    """Where nothing attends to the context, a model with the pooled one hears it, by its mean alone; one without is deaf."""
    context = jax.random.normal(KEY, (2, 3, 6))
    other = context.at[:, 0].add(1.0).at[:, 1].add(-1.0)  # the same mean

    def outputs(pooled):
        network = UNet(3, **ONE_LEVEL, context_dim=6, pooled_context=pooled)
        variables = random_parameters(network, X, TIME, None, context)
        deaf = jax.tree_util.tree_map_with_path(
            lambda path, leaf: 0 * leaf if "cross_attention" in jax.tree_util.keystr(path) else leaf, variables
        )
        run = jit(lambda context: network.apply(deaf, X, TIME, None, context))
        return run(context), run(other), run(2 * context)

    same, also, different = outputs(True)
    np.testing.assert_allclose(also, same, atol=1e-4)
    assert np.abs(different - same).max() > 0.01
    same, _, different = outputs(False)
    np.testing.assert_array_equal(different, same)


def test_position_embedding_tells_every_place_apart():
    """Numbers of row and column at the two ends of the wavelengths; no two positions get the same."""
    told = np.asarray(position_embedding(5, 7, 8), np.float64)
    y, x = np.mgrid[:5, :7]
    expected = [f(place / 10_000**power) for place in (y, x) for f in (np.sin, np.cos) for power in (0, 0.5)]
    np.testing.assert_allclose(told, np.stack(expected, -1), atol=1e-6)
    assert len(np.unique(told.reshape(35, 8).round(4), axis=0)) == 35
    with pytest.raises(ValueError, match="a multiple of 4 channels, not 6"):
        position_embedding(2, 2, 6)


def test_position_embedding_changes_what_is_seen():
    """An image of one grey level, far from its border: the same everywhere without it."""
    x = jnp.ones((1, 32, 32, 3))
    for wanted in (False, True):
        network = UNet(3, **ONE_LEVEL, position_embedding=wanted)
        out = jit(network.apply)(random_parameters(network, x, TIME[:1]), x, TIME[:1])[0, 15:17, 15:17]
        spread = float(np.ptp(np.asarray(out), axis=(0, 1)).max())
        assert spread > 1e-3 if wanted else spread < 1e-5


def test_norm_groups_are_as_many_as_asked_for():
    network = UNet(3, **TINY, norm_groups=4, context_dim=6)
    groups = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.GroupNorm):
            groups.append(context.module.num_groups)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(network.init, KEY, X, TIME, context=jnp.zeros((2, 3, 6)))
    assert set(groups) == {4} and len(groups) > 10
    with pytest.raises(ValueError, match="norm1: 8 channels cannot be split into norm_groups = 3"):
        jax.eval_shape(UNet(3, **TINY, norm_groups=3).init, KEY, X, TIME)


def test_context_must_fit_the_model():
    context = jnp.zeros((2, 4, 6))
    for settings, given, message in [
        ({}, context, "context_dim is None, but a context was given"),
        ({"context_dim": 6}, None, "context_dim is 6, but no context was given"),
        ({"context_dim": 5}, context, "context has 6 channels, context_dim is 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            shapes_of(UNet(3, **TINY | settings), X, TIME, None, given)


def test_indivisible_images_are_refused():
    with pytest.raises(ValueError, match="6x9 pixels, but patch_size 4 needs .* multiples of 4"):
        shapes_of(UNet(3, **TINY, patch_size=4), jnp.zeros((1, 6, 9, 3)), jnp.zeros(1))


def test_dropout_only_in_training():
    _, apply, variables = random_network(X, TIME, **ONE_LEVEL, dropout=0.5)
    network = UNet(3, **ONE_LEVEL, dropout=0.5)
    still = apply(variables, X, TIME)
    np.testing.assert_array_equal(still, apply(variables, X, TIME))
    train = jit(lambda key: network.apply(variables, X, TIME, train=True, rngs={"dropout": key}))
    one, other = train(jax.random.key(3)), train(jax.random.key(4))
    assert not np.allclose(one, other, atol=1e-2) and not np.allclose(one, still, atol=1e-2)
    np.testing.assert_array_equal(one, train(jax.random.key(3)))


def test_bfloat16_computes_nearly_the_same_with_float32_parameters():
    _, apply, variables = random_network(X, TIME)
    half, apply_half, _ = random_network(X, TIME, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half, X, TIME))} == {jnp.dtype(jnp.float32)}
    full, low = apply(variables, X, TIME), apply_half(variables, X, TIME)
    assert low.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((full - low) ** 2) / jnp.mean(full**2)))
    assert 1e-4 < error < 0.03, error  # smaller would mean that nothing was computed in bfloat16


def test_parameters_in_bfloat16():
    shapes = shapes_of(UNet(3, **TINY | {"param_dtype": jnp.bfloat16, "num_classes": 2}), X, TIME)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("context_dim", [None, 6])
def test_gradient_reaches_every_parameter(context_dim):
    context = None if context_dim is None else jax.random.normal(KEY, (2, 4, context_dim))
    label = jnp.array([0, 2])
    network, _, variables = random_network(X, TIME, label, context, num_classes=2, context_dim=context_dim)
    cotangent = jax.random.normal(jax.random.key(5), X.shape)
    gradients = jit(jax.grad(lambda v: jnp.sum(network.apply(v, X, TIME, label, context) * cotangent)))(variables)
    embedding = gradients["params"]["label_embedding"].pop("embedding")
    np.testing.assert_array_equal(jnp.any(embedding != 0, axis=1), [True, False, True])  # label 1 was not shown
    flat = jax.tree_util.tree_leaves_with_path(gradients)
    # A key's bias moves all logits of a softmax alike: its gradient is zero but for rounding.
    untouched = [jax.tree_util.keystr(path) for path, leaf in flat if float(jnp.abs(leaf).max()) < 1e-4]
    assert all("['key']['bias']" in path for path in untouched), untouched


def remat_case(remat):
    """Loss, gradient and number of convolutions in the gradient's program, with dropout on."""
    network, _, variables = random_network(X, TIME, **ONE_LEVEL, remat=remat, dropout=0.3)

    def loss(variables):
        return jnp.mean(network.apply(variables, X, TIME, train=True, rngs={"dropout": KEY}) ** 2)

    gradient = jit(jax.value_and_grad(loss))
    convolutions = str(gradient.trace(variables).jaxpr).count("conv_general_dilated[")
    return *gradient(variables), convolutions


def test_rematerialisation_changes_the_program_and_not_the_numbers():
    value, gradients, convolutions = remat_case(False)
    value_remat, gradients_remat, convolutions_remat = remat_case(True)
    np.testing.assert_allclose(value_remat, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_remat), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()) + 1e-7)
    # Each of the 5 blocks computes its first convolution again: the gradient of the second needs what came of it.
    assert convolutions_remat >= convolutions + 5, (convolutions, convolutions_remat)
