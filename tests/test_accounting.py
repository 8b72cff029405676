"""pytest tests/test_accounting.py: epsilon against published figures, and against Opacus."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.integrate import quad
from scipy.stats import norm

from methods import accounting
from utils import UserError

DELTA = 1e-5
TIMES = (1, 2, 4, 10)


@pytest.mark.parametrize(
    ("noise", "known"),
    [(1.0, (4.38, 6.57, 10.0, 17.9)), (2.0, (1.99, 2.94, 4.38, 7.51))],
)
def test_epsilon_of_releases_is_the_known_one(noise, known):
    found = [accounting.of_releases([noise] * times, DELTA) for times in TIMES]
    assert found == [pytest.approx(one, abs=0.05) for one in known]
    assert [float(f"{one:.3g}") for one in found] == [*known]


@pytest.mark.slow
@given(st.floats(0.01, 30), st.floats(0.01, 5))
def test_delta_is_the_integral_that_it_stands_for(epsilon, mu):
    """max over events S of P(S) - e^eps Q(S), P = N(mu, 1), Q = N(0, 1)."""
    threshold = epsilon / mu + mu / 2  # where the density ratio is e^eps

    def excess(x: float) -> float:
        return norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x)

    exact, _ = quad(excess, threshold, threshold + 40, epsabs=1e-14, limit=200)
    assert accounting.delta_of(epsilon, mu) == pytest.approx(exact, rel=1e-5, abs=1e-12)


@given(st.floats(1e-3, 40), st.floats(1e-9, 0.01))
def test_epsilon_is_the_least_that_keeps_delta(mu, delta):
    epsilon = accounting.epsilon_of(mu, delta)
    if epsilon:
        assert accounting.delta_of(epsilon, mu) <= delta
        assert accounting.delta_of(epsilon * (1 - 1e-6), mu) > delta
    else:
        assert accounting.delta_of(0.0, mu) <= delta


def test_nothing_overflows_and_nothing_is_lost():
    assert accounting.epsilon_of(0.0, DELTA) == 0
    assert accounting.of_releases([], DELTA) == 0
    assert 5e5 < accounting.epsilon_of(1000.0, DELTA) < 5.1e5
    assert 0 < accounting.epsilon_of(1e-3, 1e-5) < 1e-2


@pytest.mark.parametrize(("noise", "times"), [(1.0, 1), (2.0, 10), (5.0, 30)])
def test_epsilon_is_opacus_s(noise, times):
    """Its numerical composition is exact to its error; its bound is above."""
    exact, bound = PRVAccountant(), RDPAccountant()
    exact.history = bound.history = [(noise, 1.0, times)]
    found = accounting.of_releases([noise] * times, DELTA)
    assert found == pytest.approx(exact.get_epsilon(DELTA), abs=0.021)
    assert found <= bound.get_epsilon(DELTA)


def test_releases_of_different_noise_are_put_together():
    found = accounting.of_releases([1.0, 2.0, 2.0], DELTA)
    assert found == accounting.epsilon_of(math.sqrt(1 + 2 / 4), DELTA)
    exact = PRVAccountant()
    exact.history = [(1.0, 1.0, 1), (2.0, 1.0, 2)]
    assert found == pytest.approx(exact.get_epsilon(DELTA), abs=0.021)


@pytest.mark.slow
def test_a_secret_cohort_is_opacus_s_and_never_worse_than_a_public_one():
    for noise, rate, times in ((1.0, 0.05, 100), (0.8, 0.2, 20), (4.0, 0.99, 3)):
        found = accounting.amplified([noise] * times, rate, DELTA)
        exact, bound = PRVAccountant(), RDPAccountant()
        exact.history = bound.history = [(noise, rate, times)]
        assert exact.get_epsilon(DELTA) - 0.021 <= found <= bound.get_epsilon(DELTA)
        assert found <= accounting.of_releases([noise] * times, DELTA)
    known = accounting.of_releases([1.0] * 100, DELTA)
    assert accounting.amplified([1.0] * 100, 0.05, DELTA) < known / 10
    assert accounting.amplified([], 0.05, DELTA) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rate", [None, 0.1])
@pytest.mark.parametrize("epsilon", [0.5, 8.0, 50.0])
def test_the_noise_that_is_found_gives_the_epsilon_and_less_does_not(epsilon, rate):
    noise = accounting.noise_for(epsilon, DELTA, 10, rate)
    assert accounting.spent([noise] * 10, DELTA, rate) <= epsilon
    assert accounting.spent([noise * 0.999] * 10, DELTA, rate) > epsilon


def test_the_noise_for_known_figures():
    assert accounting.noise_for(17.86, DELTA, 10) == pytest.approx(1.0, rel=0.01)
    assert accounting.noise_for(4.3775, DELTA, 4) == pytest.approx(2.0, rel=0.01)


def test_an_epsilon_that_no_noise_gives_is_told():
    with pytest.raises(UserError, match=r"privacy\.epsilon=1e-12: no noise is enough"):
        accounting.noise_for(1e-12, 1e-12, 10)
