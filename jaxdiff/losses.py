"""What is minimised. Diffusion: the plain loss and its weightings, the variational bound, the hybrid of both.

Autoencoders: the evidence lower bound, its importance-weighted kin, the adversarial terms, and a perceptual distance.

L_simple: Ho et al. 2020 (https://arxiv.org/abs/2006.11239), eq. 14. Min-SNR: Hang et al. 2023
(https://arxiv.org/abs/2303.09556). Hybrid: Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672), eq. 16.
The terms of the bound are in `jaxdiff.diffusion.likelihood`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdiff.diffusion.likelihood import (
    Variance,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    prior_term,
    variational_bound,
    variational_term,
)
from jaxdiff.diffusion.predictions import (
    PREDICTIONS,
    Denoised,
    Denoiser,
    Network,
    check_prediction,
    data_std,
    from_x0_noise,
    input_scale,
    split_variance,
    to_x0_noise,
)
from jaxdiff.diffusion.scheduler import DiscreteSchedule, Schedule, expand_like, q_sample

LOSSES = ("simple", "min_snr", "vlb", "hybrid")
HYBRID_WEIGHT = 0.001  # of the bound, beside L_simple


def batch_mean(values: Float[Array, " b *s"], weight: Float[Array, " b"] | None = None) -> Float[Array, ""]:
    """Mean over the examples of a batch, weighted where some fill it up only: weights are 1 on average over the whole batch.

    Not divided by the sum of the weights: of a device's share they may all be 0, and means over shares are averaged in turn.
    """
    return values.mean() if weight is None else (_mean_over_patches(values) * weight).mean()


def squared_error(predicted: Float[Array, " b *s"], target: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Mean squared error of each image."""
    return ((predicted - target) ** 2).mean(tuple(range(1, target.ndim)))


def noise_mse(predicted_noise: Float[Array, "b h w c"], noise: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """L_simple of each image: the mean squared error of the noise (DDPM eq. 14)."""
    return squared_error(predicted_noise, noise)


def x0_weight(
    prediction: str, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"], sigma_data: float = 0.5
) -> Float[Array, "*b"]:
    """How the plain loss on `prediction` weighs the squared error of x0: mse(output) = x0_weight * mse(x0).

    noise: SNR; x0: 1; v: SNR + 1 (where alpha^2 + sigma^2 = 1); velocity: 1 / sigma^2; EDM (alpha = 1): the lambda of
    Karras et al. 2022, 1 / sigma^2 + 1 / sigma_data^2.
    """
    return _sigma_squared_x0_weight(prediction, alpha, sigma, sigma_data) / sigma**2


def min_snr_weight(
    prediction: str,
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
    gamma: float = 5.0,
    sigma_data: float = 0.5,
    floor: float = 0.0,
) -> Float[Array, "*b"]:
    """min(SNR, gamma) / x0_weight: the plain loss times this weighs x0's error by min(SNR, gamma) (Hang et al. 2023).

    Finite for alpha = 0 and sigma = 0. At zero terminal SNR the weight is 0: the last noise level is then not learned. With
    a `floor` it is max(SNR, floor), as in Salimans & Ho 2022 (https://arxiv.org/abs/2202.00512, section 4) with floor 1: so
    the levels where little but the condition is to be seen count, too. A floor is of no use for predicting the noise.
    """
    if prediction == "noise":
        return jnp.minimum(1.0, gamma * sigma**2 / alpha**2)
    if prediction == "x0":
        return jnp.clip(alpha**2 / sigma**2, floor, gamma)
    weight = _sigma_squared_x0_weight(prediction, alpha, sigma, sigma_data)
    return jnp.clip(alpha**2, floor * sigma**2, gamma * sigma**2) / weight


def _sigma_squared_x0_weight(
    prediction: str, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"], sigma_data: float
) -> Float[Array, "*b"]:
    # An error e of x0 at a given x_t is an error -(alpha / sigma) e of the noise; here is sigma times what they make.
    if prediction == "noise":
        return alpha**2
    if prediction == "x0":
        return sigma**2
    if prediction == "v":
        return (alpha**2 + sigma**2) ** 2
    if prediction == "velocity":
        return (alpha + sigma) ** 2
    if prediction == "edm":
        return (sigma / sigma_data) ** 2 + alpha**2
    raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")


def check_loss(loss: str, schedule: Schedule, prediction: str, learned_variance: bool = False) -> None:
    """Raise ValueError where this loss cannot train this parameterisation."""
    check_prediction(prediction, schedule, learned_variance)
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}")
    if loss in ("vlb", "hybrid") and not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"loss {loss!r} needs a DiscreteSchedule, not {type(schedule).__name__}: use 'simple'")
    if loss == "hybrid" and not learned_variance:
        raise ValueError("loss 'hybrid' trains a learned variance: set learned_variance, or use 'simple'")
    if loss in ("simple", "min_snr") and learned_variance:
        raise ValueError(f"loss {loss!r} does not train a learned variance: use 'hybrid' or 'vlb'")


def diffusion_loss(
    network: Network,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    condition: Any,
    keys: Key[Array, " b"],
    *,
    prediction: str,
    loss: str = "simple",
    learned_variance: bool = False,
    sigma_data: float | None = None,
    gamma: float = 5.0,
    floor: float = 0.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Loss of each image at one random time, and metrics; image i's time and noise come from keys[i] alone.

    "simple": mean squared error of the network's output against its target. For noise it is L_simple, for velocity the
    flow-matching loss, for EDM the loss of Karras et al. 2022, eq. 8. "min_snr": the same times `min_snr_weight`, of which
    gamma and floor are.
    "vlb": unbiased estimate of the variational bound in bits/dim (variance learned, else "fixed_small").
    "hybrid": simple + 0.001 vlb, where the bound trains the learned variance only.
    """
    check_loss(loss, schedule, prediction, learned_variance)
    sigma_data = data_std(schedule, sigma_data)
    t, noise = jax.vmap(lambda key: _time_and_noise(schedule, key, x0.shape[1:]))(keys)
    noise = jax.lax.optimization_barrier(noise)  # or a TPU draws it anew inside each convolution that reads it
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = q_sample(schedule, x0, t, noise)
    scale = expand_like(input_scale(prediction, schedule, alpha, sigma, sigma_data), x_t)
    output = network(scale * x_t, schedule.network_time(t), condition).astype(jnp.float32)
    predicted, variance_fraction = split_variance(output, learned_variance)
    mse = squared_error(predicted, from_x0_noise(prediction, x0, noise, alpha, sigma, sigma_data))
    metrics = {"mse": mse, "t": t.astype(jnp.float32)}
    if loss == "simple":
        return mse, metrics
    if loss == "min_snr":
        return mse * min_snr_weight(prediction, alpha, sigma, gamma, sigma_data, floor), metrics
    assert isinstance(schedule, DiscreteSchedule)
    denoised = Denoised(*to_x0_noise(prediction, predicted, x_t, alpha, sigma, sigma_data), variance_fraction)
    if loss == "hybrid":
        denoised = denoised._replace(x0=jax.lax.stop_gradient(denoised.x0))
    variance: Variance = "learned" if learned_variance else "fixed_small"
    # One of the T terms, times T, has the sum's expectation.
    vlb = prior_term(schedule, x0) + schedule.num_steps * variational_term(denoised, schedule, x0, t, variance)
    metrics["vlb"] = vlb
    return (vlb if loss == "vlb" else mse + HYBRID_WEIGHT * vlb), metrics


def _time_and_noise(schedule: Schedule, key: Key[Array, ""], shape: tuple[int, ...]) -> tuple[Array, Array]:
    time_key, noise_key = jax.random.split(key)
    return schedule.sample_time(time_key), jax.random.normal(noise_key, shape)


def elbo(
    denoise: Denoiser,
    schedule: DiscreteSchedule,
    x0: Float[Array, "b h w c"],
    key: Key[Array, "*b"],
    variance: Variance = "fixed_small",
) -> Float[Array, " b"]:
    """Negative evidence lower bound of each image in bits/dim, at least -log2 p(x0) / D; T network calls."""
    return variational_bound(denoise, schedule, x0, key, variance).total


# Autoencoders -------------------------------------------------------------------------------------------------------
#
# The bound of Kingma & Welling 2014 (https://arxiv.org/abs/1312.6114) and its importance-weighted kin (Burda et al. 2016,
# https://arxiv.org/abs/1509.00519); the adversarial terms of VQGAN (Esser et al. 2021, https://arxiv.org/abs/2012.09841) and
# latent diffusion. Log-likelihoods are in nats, summed over an image; x is in [-1, 1].


class DiagonalGaussian(Protocol):
    """What an encoder says of the latents; `jaxdiff.models.gaussian.Gaussian` is one."""

    @property
    def mean(self) -> Float[Array, " b *s"]:
        """Mean of each latent."""

    @property
    def log_variance(self) -> Float[Array, " b *s"]:
        """Log variance of each latent."""


def sum_over_dimensions(values: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Sum over all but the first axis."""
    return values.sum(tuple(range(1, values.ndim)))


def normal_log_density(
    x: Float[Array, " b *s"], mean: Float[Array, " b *s"], log_std: Float[Array, " *s"] | float
) -> Float[Array, " b"]:
    """Log-density N(x; mean, std^2): of latents, or a Gaussian decoder's log p(x | z), a density on the scale of [-1, 1].

    log_std: one number, or one for every element.
    """
    squared = ((x - mean) * jnp.exp(-jnp.asarray(log_std))) ** 2
    return sum_over_dimensions(-0.5 * (squared + math.log(2 * math.pi)) - log_std)


def discretized_normal_log_likelihood(
    x: Float[Array, " b *s"], mean: Float[Array, " b *s"], log_std: Float[Array, " *s"] | float
) -> Float[Array, " b"]:
    """The log p(x | z) of a decoder that gives mass to the 256 levels: what bits/dim are counted from."""
    return sum_over_dimensions(discretized_gaussian_log_likelihood(x, mean, jnp.broadcast_to(log_std, x.shape)))


def bernoulli_log_likelihood(x: Float[Array, " b *s"], logits: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """The log p(x | z) of pixels that are -1 or 1; logits are of 1.

    Grey pixels count as (1 + x) / 2 parts of a 1, as is often done; that is no likelihood of them.
    """
    return sum_over_dimensions(0.5 * (1 + x) * logits - jax.nn.softplus(logits))


def kl_with_free_bits(gaussian: DiagonalGaussian, free_bits: float = 0.0) -> Float[Array, " b"]:
    """KL(q(z | x) || N(0, 1)) in nats, where no channel of the latents counts less than `free_bits`, also in nats.

    Kingma et al. 2016 (https://arxiv.org/abs/1606.04934), eq. 15, a channel (last axis) being one group. Theirs floors a
    minibatch's mean; here each example's, so that its loss depends on itself only.
    """
    zeros = jnp.zeros_like(gaussian.mean)
    kl = gaussian_kl(gaussian.mean, gaussian.log_variance, zeros, zeros)
    by_channel = kl.sum(tuple(range(1, kl.ndim - 1)))
    return jnp.maximum(by_channel, free_bits).sum(-1)


def autoencoder_elbo(
    reconstruction: Float[Array, " b"], gaussian: DiagonalGaussian, beta: float = 1.0, free_bits: float = 0.0
) -> Float[Array, " b"]:
    """The bound log p(x | z) - beta KL(q(z | x) || p(z)) in nats: for beta >= 1 at most log p(x), on average over z.

    Kingma & Welling 2014, eq. 10; beta: Higgins et al. 2017; free bits: see `kl_with_free_bits`. To be maximised.
    """
    return reconstruction - beta * kl_with_free_bits(gaussian, free_bits)


def log_importance_weight(
    reconstruction: Float[Array, " b"], gaussian: DiagonalGaussian, z: Float[Array, " b *s"]
) -> Float[Array, " b"]:
    """The log p(x | z) + log p(z) - log q(z | x) of a z drawn from q: a one-sample ELBO, what `iwae_bound` averages."""
    prior = normal_log_density(z, jnp.zeros_like(z), 0.0)
    return reconstruction + prior - normal_log_density(z, gaussian.mean, 0.5 * gaussian.log_variance)


def iwae_bound(log_weights: Float[Array, "k b"]) -> Float[Array, " b"]:
    """The bound log (1/k) sum_i w_i in nats: on average at most log p(x), and rising to it with k (Burda et al. 2016, eq. 8)."""
    return jax.scipy.special.logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


def nats_to_bits_per_dim(log_likelihood: Float[Array, " b"], dimensions: int) -> Float[Array, " b"]:
    """-log2 p(x) / D from log p(x) in nats (or a bound of it); only a likelihood of levels compares with other models."""
    return -log_likelihood / (dimensions * math.log(2))


def absolute_error(predicted: Float[Array, " b *s"], target: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Mean absolute error of each image (L1); `squared_error` is the L2."""
    return jnp.abs(predicted - target).mean(tuple(range(1, target.ndim)))


def hinge_discriminator_loss(real: Float[Array, " b *s"], fake: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Mean of relu(1 - real) and relu(1 + fake): logits beyond the margin no longer count (Lim & Ye 2017)."""
    return 0.5 * _mean_over_patches(jax.nn.relu(1 - real)) + 0.5 * _mean_over_patches(jax.nn.relu(1 + fake))


def hinge_generator_loss(fake: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Minus the mean logit; also what goes with Wasserstein's loss."""
    return -_mean_over_patches(fake)


def non_saturating_discriminator_loss(real: Float[Array, " b *s"], fake: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Mean of -log D(real) and -log(1 - D(fake)), D = sigmoid(logit) (Goodfellow et al. 2014, eq. 1)."""
    return 0.5 * _mean_over_patches(jax.nn.softplus(-real)) + 0.5 * _mean_over_patches(jax.nn.softplus(fake))


def non_saturating_generator_loss(fake: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """-log D(fake): its gradient is largest where the discriminator is surest (Goodfellow et al. 2014, section 3)."""
    return _mean_over_patches(jax.nn.softplus(-fake))


def adaptive_weight(
    reconstruction_gradient: PyTree, adversarial_gradient: PyTree, most: float = 1e4
) -> Float[Array, ""]:
    """Weight at which the adversarial term pulls as hard as the reconstruction: |g_rec| / (|g_adv| + 1e-4), a constant.

    Esser et al. 2021, eq. 7, both gradients at the decoder's last kernel. Times latent diffusion's factor (0.5 or 0.75),
    and zero before the discriminator's start step.
    """
    ratio = optax.tree.norm(reconstruction_gradient) / (optax.tree.norm(adversarial_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, most))


def _mean_over_patches(values: Float[Array, " b *s"]) -> Float[Array, " b"]:
    return values.mean(tuple(range(1, values.ndim)))


def perceptual_distance(
    maps: Sequence[Float[Array, "b _ _ _"]],
    other_maps: Sequence[Float[Array, "b _ _ _"]],
    weights: Sequence[Float[Array, " _"]] | None = None,
) -> Float[Array, " b"]:
    """How far apart two images are to a network, by its feature maps at several depths (Zhang et al. 2018, eq. 1).

    Every pixel's features are scaled to length 1; squared differences are summed over the channels, `weights` weighing them,
    averaged over the pixels, and summed over the maps (LPIPS). Without weights it is the maps' mean, between 0 and 4.
    """
    total = jnp.zeros(maps[0].shape[0])
    for i, (ours, theirs) in enumerate(zip(maps, other_maps, strict=True)):
        squared = (_unit_length(ours) - _unit_length(theirs)) ** 2
        weight = jnp.full(squared.shape[-1], 1 / len(maps)) if weights is None else weights[i]
        total += (squared * weight[None, None, None]).sum(-1).mean((1, 2))
    return total


def _unit_length(features: Float[Array, "b h w c"], epsilon: float = 1e-10) -> Float[Array, "b h w c"]:
    # Under the root, so that the gradient is finite where all features are 0.
    return features / jnp.sqrt((features**2).sum(-1, keepdims=True) + epsilon**2)


# Generative adversarial networks --------------------------------------------------------------------------------------
#
# Wasserstein's loss with a gradient penalty (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028) as the progressive GAN
# has it (Karras et al. 2018, https://arxiv.org/abs/1710.10196, appendix A.1); R1 (Mescheder et al. 2018,
# https://arxiv.org/abs/1801.04406); the class term of AC-GAN (Odena et al. 2017, https://arxiv.org/abs/1610.09585). A critic is
# a function from images to scores, high for real. The generator's losses are `hinge_generator_loss` (Wasserstein's, too) and
# `non_saturating_generator_loss`.

Critic = Callable[[Float[Array, "b h w c"]], Float[Array, " b"]]


def mix_images(
    x: Float[Array, "b h w c"], x_fake: Float[Array, "b h w c"], keys: Key[Array, " b"]
) -> Float[Array, "b h w c"]:
    """A point on the line between each real image and a generated one, drawn uniformly by the image's own key."""
    weight = jax.vmap(jax.random.uniform)(keys)[:, None, None, None]
    return x + weight * (x_fake - x)


def input_gradient(critic: Critic, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Gradient of sum(D(x)) in x.

    Of the sum over the batch, not of each image by itself: with minibatch statistics an image counts in the others' scores.
    """
    return jax.grad(lambda x: critic(x).sum())(x)


def gradient_penalty(critic: Critic, x: Float[Array, "b h w c"], gamma: float = 1.0) -> Float[Array, " b"]:
    """(|grad| - gamma)^2 / gamma^2 at each image: 0 where the critic is as steep as gamma (Karras et al. 2018, table 4).

    x: images of `mix_images`. gamma is 750 for the paper's CIFAR-10, else 1.
    """
    squared = sum_over_dimensions(input_gradient(critic, x) ** 2)
    flat = squared == 0  # where the root has no slope: nothing to learn from there, rather than NaN
    norm = jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, squared)))
    return (norm / gamma - 1) ** 2


def wgan_gp_discriminator_loss(
    real: Float[Array, " b"],
    fake: Float[Array, " b"],
    penalty: Float[Array, " b"],
    weight: float = 10.0,
    drift: float = 1e-3,
) -> Float[Array, " b"]:
    """D(fake) - D(real) + weight * `gradient_penalty` + drift * D(real)^2, which keeps the scores near 0."""
    return fake - real + weight * penalty + drift * real**2


def r1_penalty(critic: Critic, x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """|grad|^2 / 2 at each real image (Mescheder et al. 2018, eq. 9, without its gamma)."""
    return 0.5 * sum_over_dimensions(input_gradient(critic, x) ** 2)


def r1_discriminator_loss(
    real: Float[Array, " b"], fake: Float[Array, " b"], penalty: Float[Array, " b"], weight: float = 10.0
) -> Float[Array, " b"]:
    """-log D(real) - log(1 - D(fake)) + weight * `r1_penalty`, D = sigmoid(score); goes with the non-saturating generator."""
    return jax.nn.softplus(-real) + jax.nn.softplus(fake) + weight * penalty


def class_loss(logits: Float[Array, "b k"], label: Int[Array, " b"]) -> Float[Array, " b"]:
    """-log p(label) in nats, by AC-GAN's second head: the discriminator's on reals and fakes, the generator's on fakes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)
