"""Scaling laws: the fit finds a law again, its gradient and its optimum are right."""

import numpy as np
import pytest

from nanojaxgpt.papers.scaling import Law, Points, bootstrap, fit_law, law_of, objective, vector

LAW = Law(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)


def drawn(noise: float, count: int = 60) -> Points:
    rng = np.random.default_rng(1)
    params, tokens = np.exp(rng.uniform(18, 23, count)), np.exp(rng.uniform(20, 26, count))
    return Points(params, tokens, LAW.loss(params, tokens) * np.exp(rng.normal(0, noise, count)))


@pytest.mark.slow
def test_a_law_is_found_again():
    assert law_of(vector(LAW)) == pytest.approx(LAW)
    assert fit_law(drawn(0)) == pytest.approx(LAW, rel=1e-3)
    points = drawn(0.01)
    law = fit_law(points)
    deviations = bootstrap(points, law, 20).std(0)
    assert (np.abs(vector(law) - vector(LAW)) < 4 * deviations).all()
    assert (np.abs(vector(law) - vector(LAW)) > 1e-3 * deviations).all()
    assert deviations.max() < 1


def test_an_outlier_pulls_no_harder_than_its_sign():
    points = drawn(0)
    points.losses[0] *= 3
    assert fit_law(points) == pytest.approx(LAW, rel=0.01)


def test_the_gradient_is_that_of_the_objective():
    points, found = drawn(0.01), vector(LAW) * 1.02
    value, gradient = objective(found, points)
    steps = 1e-6 * np.eye(5)
    numeric = [(objective(found + step, points)[0] - value) / 1e-6 for step in steps]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-2)


def test_the_optimum_is_the_lowest_loss_of_its_budget():
    params, tokens = LAW.optimum(1e21)
    assert 6 * params * tokens == pytest.approx(1e21)
    others = params * np.exp(np.linspace(-1, 1, 21))
    losses = LAW.loss(others, 1e21 / 6 / others)
    assert np.argmin(losses) == 10
    assert losses[10] == pytest.approx(LAW.loss(params, tokens))
