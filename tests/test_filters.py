"""packseq.cauchy, vandermonde, their conjugate forms and transpose, s4_filter and s4d_filter: against complex128 and
the dense models that the filters stand for, and as citizens of torch."""

import math
from collections.abc import Callable
from functools import partial

import longconv_reference as reference
import packseq
import pytest
import torch
from compare import ULPS_OF_TERMS, assert_accurate, assert_same_bits
from longconv_cases import FILTER_CASES, FILTERS, FILTERS_CPU_ONLY, FILTERS_ON_CPU, FilterCase
from longconv_inputs import decaying, filter_inputs, s4_parameters
from tensors import Draw, Tensors, every_other, exact_of, real, transposed, with_gradients
from torch import Tensor

F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128

# ---- accuracy

# In float64 the reference is plain torch itself, with phases of 1,500 radians and denominators near zero.
OF_FLOAT64 = 2e-12
MOST_AT_ONCE = 4_000_000  # terms that the reference holds
ALONG = {"cauchy": "z", "cauchy_conj": "z", "vandermonde_transpose": "u"}  # as long as the steps themselves


def ours(case: FilterCase) -> Callable[..., tuple[Tensor]]:
    if case.operator.startswith("cauchy"):
        return lambda v, w, z: (getattr(packseq, case.operator)(v, z, w),)
    if case.operator == "s4_spectrum":
        return lambda w, B, C, dt, P=None: (torch.ops.packseq.s4_spectrum(w, B, C, dt, case.length, P),)
    if case.operator == "vandermonde_transpose":
        return lambda u, x: (packseq.vandermonde_transpose(u, x),)
    return lambda v, x: (getattr(packseq, case.operator)(v, x, case.length),)


def plainly(case: FilterCase, tensors: Tensors, dout: Tensor) -> Tensors:
    """The output and the gradients by plain torch, a part of the steps at a time."""
    function, along = getattr(reference, case.operator), ALONG.get(case.operator)
    sums_over_steps = case.operator == "vandermonde_transpose"
    count = case.length // 2 + 1 if case.operator == "s4_spectrum" else case.length
    first = next(iter(tensors.values()))
    steps = torch.arange(count, device=first.device, dtype=first.dtype.to_real())
    if case.operator == "s4_spectrum":
        steps = 2 * math.pi * steps / case.length
    size = max(1, MOST_AT_ONCE // (case.groups * case.rows * case.poles))
    results: dict[str, list[Tensor]] = {}
    for part in (slice(begin, begin + size) for begin in range(0, count, size)):
        leaves = {name: (x[..., part] if name == along else x).detach().requires_grad_() for name, x in tensors.items()}
        out = function(**leaves) if along == "z" else function(steps[part], **leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), dout if sums_over_steps else dout[..., part])
        for name, x in (("out", out.detach()), *(("d" + n, g) for n, g in zip(leaves, grads, strict=True))):
            results.setdefault(name, []).append(x)
    in_parts = {"d" + along if along else ""} | (set() if sums_over_steps else {"out"})
    return {name: torch.cat(x, -1) if name in in_parts else sum(x) for name, x in results.items()}


def rounded(tensors: Tensors, together: bool) -> Tensors:
    """S4's exact parameters, each pole off by half an ulp of float32 as where dt w is rounded: all up, or each either
    way."""
    w, generator = tensors["w"], torch.Generator().manual_seed(0)
    signs = torch.ones(w.shape) if together else torch.randint(0, 2, w.shape, generator=generator) * 2 - 1
    return tensors | {"w": w * (1 + signs.to(w.device, F64) * torch.finfo(F32).eps / 2)}


def check_filter(case: FilterCase, device: str) -> None:
    tensors, dout = filter_inputs(case, device)
    got = with_gradients(ours(case), tensors, {"out": dout})
    theirs = plainly(case, tensors, dout)
    tensors, dout = exact_of(tensors), exact_of({"": dout})[""]
    exact = plainly(case, tensors, dout)
    assert set(got) == set(exact)
    floors, ulp = dict.fromkeys(exact, 0.0), torch.finfo(case.dtype).eps
    # Tensor cores take 22 bits of a factor: as if inputs were rounded to an ulp, not half of one.
    coarse = 2 if case.operator == "s4_spectrum" and device == "cuda" else 1
    if case.operator == "s4_spectrum":
        for together in (False, True) if case.dtype == C64 else ():
            for name, x in plainly(case, rounded(tensors, together), dout).items():
                floors[name] = max(floors[name], coarse * (x - exact[name]).abs().max().item())
        # dt stands beside every pole, and what it does there cancels.
        terms = (exact["dw"] * tensors["w"]).abs().sum(-1) / tensors["dt"]
        floors["ddt"] += max(coarse * ULPS_OF_TERMS * ulp, OF_FLOAT64 * (case.dtype == C128)) * terms.max().item()
    for name in got:
        ulps = 0 if name == "out" and coarse == 1 else coarse * ULPS_OF_TERMS
        relative = OF_FLOAT64 if case.dtype == C128 else ulps * ulp
        parts = (real(results[name]) for results in (got, exact, theirs))
        assert_accurate(name, *parts, relative=relative, floor=floors[name])


@pytest.mark.parametrize("case", [*FILTERS_ON_CPU, *FILTERS_CPU_ONLY], ids=str)
def test_accuracy_on_the_cpu(case):
    check_filter(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", FILTER_CASES, ids=str)
def test_accuracy_on_the_gpu(case):
    check_filter(case, "cuda")


def test_cases_have_names_of_their_own():
    names = [str(case) for case in [*FILTER_CASES, *FILTERS_CPU_ONLY]]
    assert len(set(names)) == len(names)


# The grid and the rule by which the S4 repository tests its kernels: 4 rows, N of both halves, relative errors.
GRID_LENGTHS = (3, 17, 489, 1024, 1047, 2048, 4096, 8192, 16_384, 262_144)
GRID_POLES = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@pytest.mark.parametrize("poles", GRID_POLES)
@pytest.mark.parametrize("length", GRID_LENGTHS)
def test_the_grid_of_the_s4_repository(device, poles, length):
    if device == "cpu" and poles * length > 2**21:
        pytest.skip("takes a CPU too long")
    case = FilterCase("cauchy_conj", poles // 2, length, rows=4)
    draw = Draw(case, device)
    angle = draw(length, dtype=F32)
    tensors = {"v": draw(4, poles // 2, dtype=C64), "w": draw(4, poles // 2, dtype=C64)}
    tensors["z"] = torch.polar(torch.ones_like(angle), angle)
    dout = draw(4, length, dtype=C64)
    got = with_gradients(ours(case), tensors, {"out": dout})
    theirs, exact = plainly(case, tensors, dout), plainly(case, exact_of(tensors), dout.to(C128))

    def error(x: Tensor, name: str) -> float:
        """Relative, but where a value is a thousandth of the largest and so what has cancelled."""
        size = exact[name].abs()
        return ((x - exact[name]).abs() / size.clamp(min=1e-3 * size.max().item())).max().item()

    for name in ("out", "dv", "dw", "dz"):
        assert error(got[name], name) <= 2 * error(theirs[name], name) + 1e-4, name


def s4d_modes(device: str, rows: int, poles: int) -> Tensor:
    """As a trained S4D has them, memories of thousands of steps among them."""
    n = torch.arange(poles, device=device, dtype=F32)
    dt = torch.logspace(-3, -1, rows, device=device)
    return dt[:, None] * torch.complex(torch.full_like(n, -0.5), math.pi * n)


@pytest.mark.parametrize("name", ["vandermonde", "vandermonde_conj"])
def test_vandermonde_is_right_to_1e_6_of_its_terms_at_16_384(device, name):
    """At every single step, however small the sum has become: phases of 10^5 and more are kept."""
    x = s4d_modes(device, 3, 32)
    v = torch.randn(3, 32, dtype=C64, generator=torch.Generator().manual_seed(0)).to(device)
    got = getattr(packseq, name)(v, x, 16_384)
    exact = getattr(reference, name)(torch.arange(16_384, device=device, dtype=F64), v.to(C128), x.to(C128))
    of_terms = reference.vandermonde(torch.arange(16_384, device=device, dtype=F64), v.abs().double(), x.real.double())
    assert ((got - exact).abs() <= 1e-6 * of_terms + 1e-37).all()


def test_vandermonde_does_not_overflow_at_1_048_576(device):
    length = 2**20
    x = torch.tensor([[0, -1e-6 + 3j, -0.01j, -80 + 1j, -1e-3 + 3.14j]], dtype=C64, device=device)
    v = torch.full_like(x, 2)
    for function in (packseq.vandermonde, packseq.vandermonde_conj):
        leaves = [t.clone().requires_grad_() for t in (v, x)]
        out = function(*leaves, length)
        assert out.isfinite().all()
        for grad in torch.autograd.grad(out, leaves, torch.ones_like(out) / length):
            assert grad.isfinite().all()
    u = torch.ones(1, length, device=device, requires_grad=True)
    out = packseq.vandermonde_transpose(u, x)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, 0].item(), complex(length), rtol=1e-6, atol=0)
    assert torch.autograd.grad(out, u, torch.ones_like(out))[0].isfinite().all()
    exact = reference.vandermonde_conj(torch.arange(length - 5, length, dtype=F64), v.cpu().to(C128), x.cpu().to(C128))
    torch.testing.assert_close(packseq.vandermonde_conj(v, x, length)[:, -5:].cpu().double(), exact, rtol=0, atol=2e-5)


# ---- gradients


def leaves_of(case: FilterCase) -> tuple[Tensors, Callable]:
    tensors, _ = filter_inputs(case, "cpu")
    return {name: x.requires_grad_() for name, x in tensors.items()}, ours(case)


@pytest.mark.parametrize(("poles", "length"), [(1, 1), (3, 2), (2, 7), (5, 12)])
@pytest.mark.parametrize("operator", FILTERS)
def test_gradcheck(operator, poles, length):
    for rank, is_real in ((0, False), (1, True), (2, False)):
        tensors, function = leaves_of(FilterCase(operator, poles, length, 2, 3, rank, is_real, C128))
        names = list(tensors)
        assert torch.autograd.gradcheck(
            lambda *x, names=names, function=function: function(**dict(zip(names, x, strict=True)))[0],
            list(tensors.values()),
        )


@pytest.mark.parametrize("conj", [False, True])
def test_nodes_that_depend_on_a_parameter_have_a_gradient(device, conj):
    """S4's own kernels give None for z."""
    function = packseq.cauchy_conj if conj else packseq.cauchy
    plain = reference.cauchy_conj if conj else reference.cauchy
    draw = Draw(FilterCase("z", 4, 9), device)
    v, w = draw(2, 4, dtype=C64), decaying(draw, 2, 4, dtype=C64) - 1
    scale = torch.tensor(0.7, device=device, requires_grad=True)
    nodes = 1j * torch.arange(9, device=device)
    [got] = torch.autograd.grad(function(v, scale * nodes, w).abs().sum(), scale)
    [expected] = torch.autograd.grad(plain(scale * nodes, v, w).abs().sum(), scale)
    torch.testing.assert_close(got, expected)
    assert got.abs() > 0.1


@pytest.mark.parametrize("operator", FILTERS)
def test_a_second_derivative_raises(device, operator):
    tensors, _ = filter_inputs(FilterCase(operator, 3, 5, rank=1), device)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = ours(FilterCase(operator, 3, 5, rank=1))(**leaves)[0]
    first = torch.autograd.grad(out.abs().square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        torch.autograd.grad(sum(x.abs().square().sum() for x in first), list(leaves.values()))


# ---- what the filters are


@pytest.mark.parametrize("length", [1, 2, 3, 8, 17, 64, 65])  # even ones have a Nyquist frequency, where o = -1
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("poles", [1, 2, 5])
def test_s4_filter_is_the_dense_model(device, poles, rank, length):
    draw = Draw(FilterCase("dense", poles, length, rank=rank), device)
    tensors = s4_parameters(draw, 3, poles, rank, C64, 2)
    exact = exact_of(tensors)
    Abar, Bbar = reference.dense_model(exact["w"], exact["B"], exact["dt"], exact.get("P"))
    expected = torch.stack([reference.dense_filter(Abar, Bbar, C, length) for C in exact["C"]])
    tensors["C"] = torch.stack([reference.c_tilde(Abar, C, length) for C in exact["C"]]).to(C64)
    k = packseq.s4_filter(**tensors, length=length)
    assert k.shape == (2, 3, length)
    torch.testing.assert_close(k.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    one = packseq.s4_filter(**tensors | {"C": tensors["C"][1]}, length=length)
    torch.testing.assert_close(one, k[1])


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("poles", [1, 2, 5])
def test_s4d_filter_is_the_dense_model(device, poles, discretization):
    draw = Draw(FilterCase("diagonal", poles, 40), device)
    tensors = s4_parameters(draw, 3, poles, 0, C64, 2)
    exact = exact_of(tensors)
    model = reference.dense_model(exact["w"], exact["B"], exact["dt"], None, discretization == "zoh")
    expected = torch.stack([reference.dense_filter(*model, C, 40) for C in exact["C"]])
    tensors["A"] = tensors.pop("w")
    k = packseq.s4d_filter(**tensors, length=40, discretization=discretization)
    assert k.shape == (2, 3, 40)
    torch.testing.assert_close(k.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    one = packseq.s4d_filter(**tensors | {"C": tensors["C"][1]}, length=40, discretization=discretization)
    torch.testing.assert_close(one, k[1])


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_s4d_modes_of_every_size(device, discretization):
    """From A = 0, an integrator, on: values and gradients are float32's, where a quotient would have cancelled."""
    sizes = [0, 1e-30, 1e-12, 1e-6, 1e-4, 0.01, 0.031, 0.0316, 0.3, 2, 40]
    A = torch.tensor([[-s + 0.5j * s for s in sizes]], dtype=C64, device=device, requires_grad=True)
    B, dt = torch.ones_like(A), torch.ones(1, device=device)
    wide = A.detach().to(C128).requires_grad_()
    half = wide / 2
    x, Bbar = packseq.s4d_modes(A, B, dt, discretization=discretization)
    if discretization == "zoh":
        terms = [wide**n / float(math.factorial(n + 1)) for n in range(30)]
        right_x, right = wide, torch.where(wide.abs() < 1, sum(terms), (torch.exp(wide) - 1) / (wide + 1e-99))
    else:
        right_x, right = torch.log1p(half) - torch.log1p(-half), 1 / (1 - half)
    for got, expected in ((x, right_x), (Bbar, right)):
        torch.testing.assert_close(got.to(C128), expected.to(C128), rtol=1e-6, atol=0)
        [grad] = torch.autograd.grad(got.real.sum(), A, retain_graph=True)
        [expected_grad] = torch.autograd.grad(expected.real.sum(), wide, retain_graph=True)
        torch.testing.assert_close(grad.to(C128), expected_grad, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("poles", [1, 3, 8])  # odd counts of pairs too
def test_conjugate_forms_are_both_halves(device, poles):
    draw = Draw(FilterCase("halves", poles, 11), device)
    v, w = draw(2, 3, poles, dtype=C64), decaying(draw, 3, poles, dtype=C64)
    z = 1j * torch.linspace(-2, 2, 11, device=device)
    both = [torch.cat([x, x.conj()], -1) for x in (v, w)]
    torch.testing.assert_close(packseq.cauchy_conj(v, z, w - 1), packseq.cauchy(both[0], z, both[1] - 1))
    torch.testing.assert_close(packseq.vandermonde_conj(v, w, 11), packseq.vandermonde(*both, 11).real)


GROUPED = {"s4_spectrum": "C", "vandermonde_transpose": "u"}  # what has groups, where it is not v


def test_numerators_share_a_denominator(device):
    """Groups of v over one w: as if each had been called alone, the gradient of w summed."""
    for operator in FILTERS:
        case = FilterCase(operator, 6, 70, 4, 3, rank=1)
        tensors, dout = filter_inputs(case, device)
        grouped = GROUPED.get(operator, "v")
        together = with_gradients(ours(case), tensors, {"out": dout})
        alone = [
            with_gradients(
                ours(case),
                {n: x[g : g + 1] if n == grouped else x for n, x in tensors.items()},
                {"out": dout[g : g + 1]},
            )
            for g in range(4)
        ]
        for name, x in together.items():
            split = name in ("out", "d" + grouped)
            expected = torch.cat([one[name] for one in alone]) if split else sum(one[name] for one in alone)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_any_number_of_dimensions(device):
    draw = Draw(FilterCase("dims", 4, 9), device)
    z = draw(9, dtype=C64)
    for groups, rows in (((), ()), ((2,), ()), ((), (3,)), ((2, 5), (3, 2)), ((1,), (1, 1))):
        v, w = draw(*groups, *rows, 4, dtype=C64), decaying(draw, *rows, 4, dtype=C64) - 1
        for got, expected in (
            (packseq.cauchy(v, z, w), reference.cauchy(z, v, w)),
            (packseq.cauchy_conj(v, z, w), reference.cauchy_conj(z, v, w)),
            (packseq.vandermonde(v, w, 5), reference.vandermonde(torch.arange(5, device=device), v, w)),
            (
                packseq.vandermonde_transpose(v, w),
                reference.vandermonde_transpose(torch.arange(4, device=device), v, w),
            ),
        ):
            assert got.shape[:-1] == (*groups, *rows)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0)], ids=["groups", "rows", "nodes"])
def test_empty_things_work(device, sizes):
    groups, rows, poles, nodes = sizes
    v = torch.ones(groups, rows, poles, dtype=C64, device=device, requires_grad=True)
    w = torch.full((rows, poles), -1 + 1j, dtype=C64, device=device, requires_grad=True)
    z = torch.zeros(nodes, dtype=C64, device=device, requires_grad=True)
    calls = [(partial(f, v, z, w), [v, z, w]) for f in (packseq.cauchy, packseq.cauchy_conj)]
    if nodes:
        calls += [(partial(f, v, w, 3), [v, w]) for f in (packseq.vandermonde, packseq.vandermonde_conj)]
        calls.append((partial(packseq.vandermonde_transpose, v, w), [v, w]))
        dt = torch.ones(rows, device=device)
        calls.append((lambda: packseq.s4_filter(w, w, v, dt, 3), [v, w]))
    for call, leaves in calls:
        out = call()
        for grad, leaf in zip(torch.autograd.grad(out, leaves, torch.ones_like(out)), leaves, strict=True):
            assert grad.shape == leaf.shape
            assert (grad == 0).all()  # a sum over nothing


def test_strides_and_lazy_conjugates_change_nothing(device):
    for operator in FILTERS:
        case = FilterCase(operator, 5, 21, 2, 3, rank=2)
        tensors, dout = filter_inputs(case, device)
        expected = with_gradients(ours(case), tensors, {"out": dout})
        odd = {name: every_other(x) for name, x in tensors.items()}
        got = with_gradients(ours(case), odd, {"out": transposed(dout)})
        for name in expected:
            assert_same_bits(f"{operator}: {name}", real(got[name]), real(expected[name]))
        lazy = {name: x.conj().resolve_conj().conj() if x.is_complex() else x for name, x in tensors.items()}
        assert_same_bits(operator, real(ours(case)(**lazy)[0]), real(expected["out"]))
