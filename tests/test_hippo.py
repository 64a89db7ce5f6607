"""packseq.nn.hippo against the published formulas, in float64: entry by entry, as functions of time, and by what states
remember."""

import math
from collections.abc import Callable

import pytest
import torch
from packseq.nn import hippo
from torch import Tensor

F64 = torch.float64
STATES = [2, 6, 32, 64, 256]


def legendre(n: int, x: Tensor) -> Tensor:
    """The n-th Legendre polynomial on [0, 1], of norm 1."""
    x = 2 * x - 1
    before, now = torch.zeros_like(x), torch.ones_like(x)
    for m in range(n):
        before, now = now, ((2 * m + 1) * x * now - m * before) / (m + 1)
    return math.sqrt(2 * n + 1) * now


def trigonometric(n: int, x: Tensor) -> Tensor:
    """1, and a cosine and a sine of each frequency, of norm 1 on [0, 1]."""
    turn = 2 * math.pi * ((n + 1) // 2) * x
    return torch.ones_like(x) if n == 0 else math.sqrt(2) * (turn.cos() if n % 2 else turn.sin())


def entry(measure: str, n: int, k: int) -> float:
    """A[n, k], as printed."""
    root = math.sqrt((2 * n + 1) * (2 * k + 1))
    if measure == "legs":
        return -root if n > k else -(n + 1) if n == k else 0
    if measure == "legt":
        return -root * (1 if k <= n else (-1) ** (n - k))
    if n == k == 0:
        return -2
    if (n == 0 and k % 2) or (k == 0 and n % 2):
        return -2 * math.sqrt(2)
    if n % 2 and k % 2:
        return -4
    if n - k == 1 and k % 2:
        return math.pi * (k + 1)
    if k - n == 1 and n % 2:
        return -math.pi * (n + 1)
    return 0


@pytest.mark.parametrize("measure", hippo.MEASURES)
@pytest.mark.parametrize("states", [1, 2, 7, 16])
def test_matrices_are_as_published(measure, states):
    A, B = hippo.hippo(measure, states)
    expected = torch.tensor([[entry(measure, n, k) for k in range(states)] for n in range(states)], dtype=F64)
    torch.testing.assert_close(A, expected, rtol=1e-14, atol=0)
    if measure == "fourier":
        expected = torch.tensor([2 if n == 0 else 2 * math.sqrt(2) * (n % 2) for n in range(states)], dtype=F64)
    else:
        expected = torch.tensor([math.sqrt(2 * n + 1) for n in range(states)], dtype=F64)
    torch.testing.assert_close(B, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("measure", hippo.MEASURES)
@pytest.mark.parametrize("states", STATES)
def test_diagonal_plus_low_rank_is_the_same_matrix(measure, states):
    A, B = hippo.hippo(measure, states)
    form = hippo.diagonal_plus_low_rank(measure, states)
    assert form.w.shape == form.B.shape == (states // 2,)
    assert form.P.shape == (2 if measure == "legt" else 1, states // 2)
    w, P, b, V = (torch.cat([x, x.conj()], dim=-1) for x in form)
    limit = 1e-13 * states * A.abs().max().item()
    torch.testing.assert_close(V @ V.mH, torch.eye(states, dtype=V.dtype), rtol=0, atol=1e-12)
    again = V @ (torch.diag(w) - P.T @ P.conj()) @ V.mH
    torch.testing.assert_close(again, A.to(V.dtype), rtol=0, atol=limit)
    torch.testing.assert_close(V @ b, B.to(V.dtype), rtol=0, atol=1e-13 * states * B.norm().item())
    torch.testing.assert_close(form.w.real, torch.full_like(form.w.real, -0.5 if measure == "legs" else 0))
    assert (form.w.imag >= 0).all()
    assert (form.w.imag.diff() < 0).all()


@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_states_are_twice_the_real_part_of_the_kept_half(measure):
    A, B = hippo.hippo(measure, 12)
    form = hippo.diagonal_plus_low_rank(measure, 12)
    w, P, b = (torch.cat([x, x.conj()], dim=-1) for x in form[:3])
    for time in (0.1, 0.7, 2.0):
        h = torch.linalg.matrix_exp(time * (torch.diag(w) - P.T @ P.conj())) @ b
        expected = torch.linalg.matrix_exp(time * A) @ B
        torch.testing.assert_close(2 * (form.V @ h[:6]).real, expected, rtol=0, atol=1e-11)


def test_poles_of_legs_are_the_whole_numbers():
    A, _ = hippo.hippo("legs", 8)
    torch.testing.assert_close(A.diagonal(), -torch.arange(1, 9, dtype=F64))
    assert not A.triu(1).any()


@pytest.mark.parametrize("time", [0.0, 0.01, 0.3, 1.0, 4.0])
def test_legs_weighs_the_past_by_legendre_polynomials_of_exp(time):
    """exp(t A) B is L_n(exp(-t)) exp(-t)."""
    A, B = hippo.hippo("legs", 16)
    decayed = torch.tensor(time, dtype=F64).neg().exp()
    expected = torch.stack([legendre(n, decayed) * decayed for n in range(16)])
    torch.testing.assert_close(torch.linalg.matrix_exp(time * A) @ B, expected, rtol=0, atol=1e-11)


def remembered(
    measure: str, states: int, signal: Callable[[Tensor], Tensor], end: float, steps: int = 30_000
) -> Tensor:
    """The state at `end`, by the trapezoidal rule."""
    A, B = hippo.hippo(measure, states)
    dt = end / steps
    identity = torch.eye(states, dtype=F64)
    left, right = identity - dt / 2 * A, identity + dt / 2 * A
    step, weight = torch.linalg.solve(left, right), torch.linalg.solve(left, dt * B)
    values = signal(torch.linspace(0, end, steps + 1, dtype=F64))
    state = torch.zeros(states, dtype=F64)
    for value in (values[1:] + values[:-1]) / 2:
        state = step @ state + weight * value
    return state


@pytest.mark.parametrize(("measure", "states", "limit"), [("legt", 16, 1e-3), ("fourier", 41, 1e-2)])
def test_windows_reconstruct_the_last_unit_of_time(measure, states, limit):
    def signal(t: Tensor) -> Tensor:
        return (2 * math.pi * t).sin() + 0.5 * (4 * math.pi * t + 1).cos() + 0.3

    state = remembered(measure, states, signal, end=3.0)
    back = torch.linspace(0.05, 0.95, 50, dtype=F64)
    basis = (lambda n, x: legendre(n, 1 - x)) if measure == "legt" else trigonometric
    rebuilt = sum(state[n] * basis(n, back) for n in range(states))
    torch.testing.assert_close(rebuilt, signal(3 - back), rtol=0, atol=limit)


@pytest.mark.parametrize("states", STATES)
def test_poles_of_s4d_are_as_published(states):
    n = torch.arange(states // 2, dtype=F64)
    lin, ones = hippo.diagonal("lin", states)
    torch.testing.assert_close(lin, -0.5 + 1j * math.pi * n)
    assert (ones == 1).all()
    inv, ones = hippo.diagonal("inv", states)
    torch.testing.assert_close(inv, -0.5 + 1j * (states / math.pi) * (states / (2 * n + 1) - 1))
    assert (ones == 1).all()
    legs, B = hippo.diagonal("legs", states)
    form = hippo.diagonal_plus_low_rank("legs", states)
    assert torch.equal(legs, form.w)
    assert torch.equal(B, form.B / 2)


def test_diagonal_legs_comes_near_legs_with_more_states():
    """In what a constant input leaves in the first states (the filters alone come near only on average)."""
    times = torch.linspace(0, 3, 301, dtype=F64)
    A, B = hippo.hippo("legs", 8)
    exact = torch.linalg.solve(A, (torch.linalg.matrix_exp(times[:, None, None] * A) @ B - B).T)
    errors = []
    for states in (16, 64, 256):
        w, b = hippo.diagonal("legs", states)
        V = hippo.diagonal_plus_low_rank("legs", states).V
        got = 2 * (V[:3] @ (torch.expm1(w[:, None] * times) * (b / w)[:, None])).real
        errors.append((got - exact[:3]).abs().max().item())
    assert errors[2] < 0.2 * errors[1] < 0.04 * errors[0] < 0.04 * 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo.hippo("lagt", 4), r"hippo: measure must be one of 'legs', 'legt', 'fourier', got 'lagt'"),
        (lambda: hippo.hippo("legs", 0), "hippo: states must be positive, got 0"),
        (lambda: hippo.low_rank("lin", 4), "low_rank: measure must be one of"),
        (lambda: hippo.diagonal_plus_low_rank("legs", 5), "states must be even and positive, got 5"),
        (lambda: hippo.diagonal("random", 4), r"diagonal: kind must be one of 'legs', 'lin', 'inv', got 'random'"),
        (lambda: hippo.diagonal("inv", 3), "diagonal: states must be even and positive, got 3"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
