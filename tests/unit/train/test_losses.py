"""Losses where the right answer is known."""

from __future__ import annotations

import torch

from train.losses import (
    asd_discriminator_loss,
    asd_generator_loss,
    dmd_gradient,
    dmd_loss,
    finite_difference_penalty,
    flow_matching_loss,
    flow_to_x0,
    guided_x0,
    noise_levels,
    noisy_latents,
    shifted_sigma,
)


def test_noise_and_x0_are_inverse() -> None:
    x0, noise = torch.randn(3, 4, 2, 6, 6), torch.randn(3, 4, 2, 6, 6)
    for sigma in (torch.rand(3), torch.rand(3, 4)):
        x_t = noisy_latents(x0, noise, sigma)
        torch.testing.assert_close(flow_to_x0(noise - x0, x_t, sigma), x0, atol=1e-5, rtol=1e-5)


def test_shift_keeps_the_ends_and_raises_the_middle() -> None:
    u = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shifted_sigma(u, 5.0), torch.tensor([0.0, 5 / 6, 1.0]))


def test_flow_matching_gradient_goes_into_the_flow_alone() -> None:
    flow, x0, noise = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    flow_matching_loss(flow, x0, noise).backward()
    assert flow.grad is not None
    assert x0.grad is None
    assert noise.grad is None
    torch.testing.assert_close(flow.grad, 2 * (flow - noise + x0).detach() / flow.numel())


def test_dmd_loss_has_the_dmd_gradient() -> None:
    x = torch.randn(2, 3, 4, 2, 2, requires_grad=True)
    fake, real = torch.randn_like(x), torch.randn_like(x)
    gradient = dmd_gradient(x, fake, real)
    scale = (x.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient, (fake - real) / scale)
    dmd_loss(x, gradient).backward()
    torch.testing.assert_close(x.grad, gradient / x.numel())


def test_dmd_moves_a_gaussian_onto_its_target() -> None:
    """Student N(m, 1), target N(2, 1): the scores are analytic, so DMD must bring m to 2."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=0.3)

    def predict(x_t: torch.Tensor, sigma: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        # E[x0 | x_t] for x0 ~ N(centre, 1), x_t = (1 - sigma) x0 + sigma noise
        a, b = 1 - sigma[:, None], sigma[:, None]
        return centre + a / (a**2 + b**2) * (x_t - a * centre)

    for _ in range(200):
        x = mean + torch.randn(256, 1, generator=generator)
        sigma = 0.02 + 0.96 * torch.rand(256, generator=generator)
        x_t = noisy_latents(x, torch.randn(256, 1, generator=generator), sigma).detach()
        fake = predict(x_t, sigma, mean.detach())
        real = predict(x_t, sigma, torch.tensor([2.0]))
        loss = dmd_loss(x, dmd_gradient(x, fake, real))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(mean.item() - 2.0) < 0.1


def test_asd_losses_push_in_opposite_directions() -> None:
    fake, real = torch.zeros(4, requires_grad=True), torch.ones(4, requires_grad=True)
    asd_generator_loss(fake, real).backward()
    assert fake.grad is not None
    assert (fake.grad < 0).all()
    assert real.grad is None  # the (n+1)-step rollout gets no gradient
    fake.grad = None
    asd_discriminator_loss(fake, real).backward()
    assert (fake.grad > 0).all()
    assert real.grad is not None
    assert (real.grad < 0).all()


def test_finite_difference_penalty_is_the_squared_slope() -> None:
    weight, x, eps = 3.0, torch.randn(1000), 0.01 * torch.randn(1000)
    penalty = finite_difference_penalty(weight * x, weight * (x + eps))
    torch.testing.assert_close(
        penalty / (eps**2).mean(), torch.tensor(weight**2), rtol=1e-3, atol=0
    )


def test_guidance_of_one_is_the_conditional() -> None:
    cond, uncond = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(guided_x0(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided_x0(cond, uncond, 0.0), uncond)


def test_noise_levels_are_shared_or_of_their_own_by_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    even = noise_levels(50, 12, 3, 0.0, generator)
    assert (even == even[:, :1]).all()
    mixed = noise_levels(200, 12, 3, 1.0, generator)
    assert (mixed.unflatten(1, (4, 3)) == mixed[:, ::3, None]).all()
    assert 0.15 < (mixed == 0).float().mean() < 0.35
    assert mixed.max() < 1


def test_anchored_noise_levels_leave_one_frame_clearer_than_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = noise_levels(300, 12, 1, 0.0, generator, anchored=1.0)
    anchor, around = levels.min(dim=1, keepdim=True).values, levels.max(dim=1, keepdim=True).values
    assert (around >= 0.5).all()
    assert (anchor <= 0.5).all()
    assert ((levels == anchor).sum(dim=1) == 1).all()
    assert ((levels == around).sum(dim=1) == 11).all()
    assert 0.3 < (anchor == 0).float().mean() < 0.7
    assert len(levels.argmin(dim=1).unique()) == 12
    both = noise_levels(400, 12, 3, 0.25, generator, anchored=0.35)
    odd_one_out = (both != both[:, :1]).any(dim=1).float().mean()
    assert 0.5 < odd_one_out < 0.7
