"""The ellipsoid that features reach: its matrix in closed form, what it depends on, heads behind it."""

import re

import pytest
import torch
from torch import nn

from convex_head import errors
from convex_head.displacement import MovedImages, attacked_images, whitening
from convex_head.head import ConvexRobustHead
from convex_head.threat import ThreatModel

THREAT = ThreatModel("Linf", 0.1)


def linear_backbone(jacobian, scale=1e-3):
    """Images (n, 1, 1, k) near 1/2 to features J x, which eps leaves inside [0, 1]; the features of 400 images."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(jacobian.shape[1], len(jacobian)))
    net[1].weight.data, net[1].bias.data = jacobian.float(), torch.zeros(len(jacobian))
    images = 0.5 + scale * torch.randn(400, 1, 1, jacobian.shape[1], generator=torch.Generator().manual_seed(3))
    return net, images, images.flatten(1) @ jacobian.float().mT


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_radius_one_is_the_mean_reach_which_is_closed_form_for_linear_backbones(norm):
    """In direction w behind W it is eps |J'D W w|_1 or _2, D the deviations' inverse."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])) @ torch.randn(5, 12, generator=generator)
    net, images, features = linear_backbone(jacobian)
    matrix = whitening(net, images, features, ThreatModel(norm, 0.1))
    back = jacobian.double() / features.double().std(0, correction=0)[:, None]

    def reach(directions):
        moved = directions @ matrix.mT @ back
        return 0.1 * (moved.abs().sum(1) if norm == "Linf" else moved.norm(dim=1))

    directions = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    assert float(reach(directions / directions.norm(dim=1, keepdim=True)).mean()) == pytest.approx(1, abs=0.03)
    along = reach(torch.eye(5).double())
    assert float(along.max() / along.min()) < 2.5
    # Displacements of random directions have one covariance but for the shrinkage.
    v = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    step = (v @ back).sign() if norm == "Linf" else (v @ back) / (v @ back).norm(dim=1, keepdim=True)
    shift = 0.1 * step @ back.mT
    spread = [torch.linalg.eigvalsh(d.mT @ d / len(d)) for d in (shift, shift @ matrix)]
    assert float(spread[1][-1] / spread[1][0]) < 0.3 * float(spread[0][-1] / spread[0][0])


def test_whitening_depends_on_its_seed_alone_and_takes_images_of_all_classes():
    jacobian = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    net, images, features = linear_backbone(jacobian)
    state = torch.get_rng_state()
    found = [whitening(net, images, features, THREAT, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    # Sorted rows: the first 2,000 of 4,000 do not move at all.
    still = torch.cat([torch.zeros(3000, 1, 1, 6), images.repeat(10, 1, 1, 1)[:1000]])
    gate = nn.Sequential(nn.Threshold(0.2, 0.0), net)
    assert float(whitening(gate, still, gate(still).detach(), THREAT).norm()) > 0


def test_images_are_moved_in_proportion_to_the_features_and_equally_often():
    net, images, features = linear_backbone(torch.randn(150, 12, generator=torch.Generator().manual_seed(1)))
    sample = MovedImages(net, images, features, THREAT)
    assert torch.bincount(sample.rows).tolist() == [6] * 400
    along, shift = sample.ascended(torch.eye(150).double(), steps=3, draws=100)
    assert along.shape == (100,) and shift.shape == (100, 150)
    # Linear: one step reaches as far as several, and what is gained along a direction is its share of the displacement.
    once = MovedImages(net, images, features, THREAT).ascended(draws=100)
    torch.testing.assert_close(once[0], along, rtol=1e-3, atol=1e-4)
    assert bool((along > 0).all()) and bool((along <= shift.double().norm(dim=1)).all())


def test_the_ellipsoid_does_not_depend_on_the_batch():
    net, images, features = linear_backbone(torch.randn(5, 12, generator=torch.Generator().manual_seed(1)))
    small, large = (whitening(net, images, features, THREAT, batch=batch) for batch in (37, 4096))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-7)


def test_whitening_of_double_backbones_and_constant_features():
    jacobian = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    jacobian[1] = 0
    net, images, features = linear_backbone(jacobian)
    single = whitening(net, images, features, THREAT)
    assert bool(single.isfinite().all())
    torch.testing.assert_close(whitening(net.double(), images, features, THREAT), single, rtol=1e-2, atol=1e-2)


def test_whitening_must_be_a_square_invertible_matrix():
    for wrong, found in ((torch.eye(3), "(3, 3)"), ([1.0], "list"), (torch.zeros(4, 4), "singular values from 0")):
        with pytest.raises(errors.SettingError, match=re.escape(found)):
            ConvexRobustHead(4, 2, whitening=wrong)


@pytest.mark.parametrize("activation", ["polynomial", "relu"])
def test_a_whitened_head_is_the_head_of_whitened_features(activation):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.arange(60) % 2
    x[:, 0] += 2.0 * y
    matrix = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=generator)
    settings = {"radius": 0.3, "reg": 0.05, "activation": activation}
    inside = ConvexRobustHead(4, 2, whitening=matrix, standardize=False, **settings).fit(x, y, tol=1e-2)
    outside = ConvexRobustHead(4, 2, standardize=False, **settings).fit(x @ matrix, y, tol=1e-2)
    # Gates of rounded features make other steps to the same optimum, which tol leaves so far apart.
    near = {"atol": 1e-3 if activation == "polynomial" else 2e-2, "rtol": 1e-3}
    torch.testing.assert_close(inside(x), outside(x @ matrix), **near)
    for name in ("worst_case_margin", "distance_to_boundary"):
        torch.testing.assert_close(getattr(inside, name)(x, y), getattr(outside, name)(x @ matrix, y), **near)


def test_attacked_displacements_are_a_tenth_of_the_covariance_and_heads_count_alike():
    net, images, features = linear_backbone(torch.randn(4, 9, generator=torch.Generator().manual_seed(1)))
    sample = MovedImages(net, images, features, THREAT)
    shift = sample.ascended()[1].double()
    generator = torch.Generator().manual_seed(2)
    one, many = (shift.std() * torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (50, 500))

    def shape(matrix):
        found = torch.linalg.inv(matrix @ matrix.mT)
        return found / found.trace()

    wanted = 0.9 * shift.mT @ shift / len(shift) + 0.05 * (one.mT @ one / 50 + many.mT @ many / 500)
    wanted += 0.1 * wanted.trace() / 4 * torch.eye(4)
    wanted /= wanted.trace()
    torch.testing.assert_close(shape(sample.whitening(shift, [one, many])), wanted, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(shape(sample.whitening(shift)), wanted, atol=1e-3)


def test_few_steps_of_an_attack_reach_eps():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.full((3, 1, 2, 2), 0.5)
    for steps in (1, 2, 3, 4, 10):
        found = attacked_images(net, images, torch.zeros(3, dtype=torch.long), THREAT, steps=steps)
        torch.testing.assert_close((found - images).abs(), torch.full_like(images, 0.1))
