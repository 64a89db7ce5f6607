"""The filters' sums and filters keep the promises that every operator does: the same bits, isolation, PyTorch."""

import math
from collections.abc import Callable
from functools import partial

import packseq
import pytest
import torch
from compare import assert_same_bits
from longconv_cases import FILTERS, FilterCase
from longconv_inputs import filter_inputs, s4_parameters
from operators import captured, free_memory
from tensors import Draw, Tensors, real, with_gradients
from test_filters import GROUPED, ours
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128


# ---- the same bits


@pytest.mark.parametrize("operator", FILTERS)
def test_every_run_gives_the_same_bits_whatever_the_threads(device, operator):
    case = FilterCase(operator, 70, 1500, 2, 5, rank=1)
    tensors, dout = filter_inputs(case, device)
    expected = with_gradients(ours(case), tensors, {"out": dout})
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            got = with_gradients(ours(case), tensors, {"out": dout})
            for name in expected:
                assert_same_bits(f"{n} threads: {name}", real(got[name]), real(expected[name]))
    finally:
        torch.set_num_threads(threads)


def of_rows(name: str, x: Tensor, rows: Tensor | list[int]) -> Tensor:
    """Some rows of an argument or a result; z belongs to all."""
    rows = torch.as_tensor(rows, device=x.device)
    return x if name in ("z", "dz") else x.index_select(-1 if name.endswith("dt") else -2, rows)


def assert_same_rows(what: str, got: Tensors, expected: Tensors) -> None:
    for name in expected:
        if name != "dz":  # a sum over all rows
            assert_same_bits(f"{what}: {name}", real(got[name]), real(expected[name]))


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("operator", FILTERS)
def test_a_row_never_reaches_another(device, operator, poison):
    case = FilterCase(operator, 6, 40, 2, 5, rank=2)
    tensors, dout = filter_inputs(case, device)
    clean = with_gradients(ours(case), tensors, {"out": dout})
    sick = {name: x.clone() for name, x in (tensors | {"dout": dout}).items()}
    for name, x in sick.items():
        if name != "z":
            x.select(-1 if name == "dt" else -2, 2).fill_(poison)
    got = with_gradients(ours(case), sick, {"out": sick.pop("dout")})
    assert real(of_rows("out", got["out"], [2])).isnan().any()
    healthy = ({name: of_rows(name, x, [0, 1, 3, 4]) for name, x in results.items()} for results in (got, clean))
    assert_same_rows(operator, *healthy)


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("operator", FILTERS)
def test_a_group_never_reaches_another(device, operator, poison):
    case, grouped = FilterCase(operator, 6, 40, 3, 5, rank=1), GROUPED.get(operator, "v")
    tensors, dout = filter_inputs(case, device)
    clean = with_gradients(ours(case), tensors, {"out": dout})
    sick, sick_dout = tensors | {grouped: tensors[grouped].clone()}, dout.clone()
    for x in (sick[grouped], sick_dout):
        x[1, 2] = poison
    got = with_gradients(ours(case), sick, {"out": sick_dout})
    for name in ("out", "d" + grouped):
        pairs = [real(x[name])[[0, 2]] for x in (got, clean)]
        assert_same_bits(f"{operator}: {name}", *pairs)


@pytest.mark.parametrize("size", [math.nan, 1e14, 1e-14], ids=str)
def test_a_group_takes_its_own_way(device, size):
    """At imaginary nodes numerators that are far out are summed otherwise: theirs alone."""
    generator = torch.Generator().manual_seed(3)
    v, w = (torch.randn(*shape, 6, generator=generator, dtype=C64).to(device) for shape in ((5, 4), (4,)))
    z = torch.linspace(0.1, 3, 40, device=device) * 1j
    sick = v.clone()
    sick[1, 2] = size
    clean, got = (packseq.cauchy_conj(x, z, w - w.real.abs() - 0.1) for x in (v, sick))
    assert_same_bits("out", real(got)[[0, 2, 3, 4]], real(clean)[[0, 2, 3, 4]])
    assert got[1, 2].isnan().all() == math.isnan(size)


@pytest.mark.parametrize("operator", FILTERS)
def test_nan_in_any_argument_shows(device, operator):
    case = FilterCase(operator, 6, 40, 2, 5, rank=2)
    tensors, dout = filter_inputs(case, device)
    for name, x in tensors.items():
        sick = tensors | {name: x.clone()}
        sick[name][..., 0] = math.nan
        assert real(ours(case)(**sick)[0]).isnan().any(), name
    for name, x in with_gradients(ours(case), tensors, {"out": torch.full_like(dout, math.nan)}).items():
        assert name == "out" or real(x).isnan().any(), name


@pytest.mark.parametrize("length", [40, 3000])
@pytest.mark.parametrize("operator", FILTERS)
def test_a_row_gives_the_same_bits_alone(device, operator, length):
    case = FilterCase(operator, 33, length, 2, 7, rank=2)
    tensors, dout = filter_inputs(case, device)
    together = with_gradients(ours(case), tensors, {"out": dout})
    for rows in ([0], [3], [6], [6, 1, 3]):
        some = {name: of_rows(name, x, rows) for name, x in tensors.items()}
        got = with_gradients(ours(case), some, {"out": of_rows("dout", dout, rows)})
        assert_same_rows(f"{operator}, {rows}", got, {name: of_rows(name, x, rows) for name, x in together.items()})


@pytest.mark.big
@pytest.mark.parametrize("operator", FILTERS)
def test_more_than_two_to_the_31_outputs(device, operator):
    """Rows that are all the same, so many that a step's offset is beyond 32 bits."""
    case = FilterCase(operator, 1, 1024, rank=1, real=True)
    tensors, dout = filter_inputs(case, device)
    fixed = {name: tensors.pop(name) for name in ("z",) if name in tensors}
    call = partial(ours(case), **fixed)
    expected = with_gradients(call, tensors, {"out": dout})
    long = tensors["u"] if operator == "vandermonde_transpose" else dout
    count = 2**31 // long.shape[-1] + 2
    needed = 4 * count * long.shape[-1] * long.element_size()  # it, its gradient, and copies of both
    if free_memory(device) < needed:
        pytest.skip(f"needs {needed >> 30} GiB of memory")
    every = torch.zeros(count, dtype=torch.int64, device=device)
    got = with_gradients(
        call, {name: of_rows(name, x, every) for name, x in tensors.items()}, {"out": of_rows("out", dout, every)}
    )
    for row in (0, count // 2, count - 1):
        assert_same_rows(f"row {row}", {name: of_rows(name, x, [row]) for name, x in got.items()}, expected)


# ---- PyTorch citizens


def calls_of(device: str) -> list[tuple[Callable, list, list]]:
    """Each forward and backward operator with its arguments."""
    calls = []
    for operator in FILTERS:
        case = FilterCase(operator, 3, 8, 2, 3, rank=1)
        tensors, dout = filter_inputs(case, device)
        ops = torch.ops.packseq
        if operator.startswith("cauchy"):
            v, w, z = (tensors[name] for name in ("v", "w", "z"))
            conj = operator.endswith("conj")
            calls.append((ops.cauchy.default, [v, z, w, conj]))
            calls += [(ops.cauchy_backward.default, [dout, v, z, w, conj, wants]) for wants in (False, True)]
        elif operator == "s4_spectrum":
            w, B, C, dt, P = tensors.values()
            for low_rank in (None, P):
                calls.append((ops.s4_spectrum.default, [w, B, C, dt, 8, low_rank]))
                calls.append((ops.s4_spectrum_backward.default, [dout, w, B, C, dt, 8, low_rank]))
        elif operator == "vandermonde_transpose":
            for u in (tensors["u"], tensors["u"].real.contiguous()):
                calls.append((ops.vandermonde_transpose.default, [u, tensors["x"]]))
                calls.append((ops.vandermonde_transpose_backward.default, [dout, u, tensors["x"]]))
        else:
            v, x, conj = tensors["v"], tensors["x"], operator.endswith("conj")
            calls.append((ops.vandermonde.default, [v, x, 8, conj]))
            calls.append((ops.vandermonde_backward.default, [dout, v, x, 8, conj]))
    return calls


def test_opcheck(device):
    for function, args in calls_of(device):
        torch.library.opcheck(function, args)
        if not function.name().endswith("_backward"):
            leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in args]
            torch.library.opcheck(function, leaves)


def test_meta_tensors_know_the_results(device):
    for function, args in calls_of(device):
        real_results = function(*args)
        results = function(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
        real_results, results = ((x,) if isinstance(x, Tensor) else x for x in (real_results, results))
        for meta, expected in zip(results, real_results, strict=True):
            assert (meta.shape, meta.dtype, meta.stride()) == (expected.shape, expected.dtype, expected.stride())


def s4_and_s4d(w: Tensor, B: Tensor, C: Tensor, dt: Tensor, P: Tensor, length: int) -> Tensor:
    return packseq.s4_filter(w, B, C, dt, length, P=P) + packseq.s4d_filter(w, B, C, dt, length)


PUBLIC = {
    "cauchy": lambda v, w, z, length: packseq.cauchy(v, z, w),
    "cauchy_conj": lambda v, w, z, length: packseq.cauchy_conj(v, z, w),
    "vandermonde": packseq.vandermonde,
    "vandermonde_conj": packseq.vandermonde_conj,
    "vandermonde_transpose": lambda u, x, length: packseq.vandermonde_transpose(u, x),
    "s4_spectrum": s4_and_s4d,
}
every_public = pytest.mark.parametrize("operator", FILTERS)


@every_public
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_lengths_that_change(device, backend, operator):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(PUBLIC[operator], fullgraph=True, backend=counter)
    for length in (32, 45, 17, 96):
        tensors, _ = filter_inputs(FilterCase(operator, 4, length, 2, 3, rank=1), device)
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        results = [f(**leaves, length=length) for f in (PUBLIC[operator], compiled)]
        torch.testing.assert_close(results[1], results[0])
        grads = [torch.autograd.grad(real(x).square().sum(), list(leaves.values())) for x in results]
        for name, expected, got in zip(leaves, *grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item(), msg=name)
    assert counter.frame_count <= 2, "recompiled more than once"


@every_public
def test_exports(device, operator):
    class Module(torch.nn.Module):
        def forward(self, tensors: Tensors) -> Tensor:
            return PUBLIC[operator](**tensors, length=24)

    tensors, _ = filter_inputs(FilterCase(operator, 4, 24, 2, 3, rank=1), device)
    program = torch.export.export(Module(), (tensors,))
    torch.testing.assert_close(program.module()(tensors), PUBLIC[operator](**tensors, length=24))


@every_public
def test_autocast_leaves_filters_alone(device, operator):
    tensors, dout = filter_inputs(FilterCase(operator, 4, 24, 2, 3, rank=1, real=True), device)

    def call(**leaves: Tensor) -> tuple[Tensor]:
        return (PUBLIC[operator](**leaves, length=24),)

    if operator == "s4_spectrum":
        dout = torch.ones(2, 3, 24, device=device)
    expected = with_gradients(call, tensors, {"out": dout})
    with torch.autocast(device, dtype=torch.bfloat16):
        got = with_gradients(call, tensors, {"out": dout})
    for name in expected:
        assert_same_bits(name, real(got[name]), real(expected[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_steps_in_half_types_are_widened(device, dtype):
    tensors = s4_parameters(Draw(FilterCase("half", 4, 8), device), 3, 4, 0, C64)
    half = tensors.pop("dt").to(dtype)
    diagonal = {"A" if name == "w" else name: x for name, x in tensors.items()}
    for function, model in ((packseq.s4_filter, tensors), (packseq.s4d_filter, diagonal)):
        assert_same_bits("k", function(**model, dt=half, length=24), function(**model, dt=half.float(), length=24))


@pytest.mark.gpu
@pytest.mark.parametrize("operator", FILTERS)
def test_a_captured_graph_replays(operator):
    case = FilterCase(operator, 33, 500, 2, 3, rank=2)
    tensors, dout = filter_inputs(case, "cuda")
    call = partial(with_gradients, ours(case), tensors, {"out": dout})
    graph, results = captured(call)
    for x in tensors.values():
        x.mul_(0.75)
    graph.replay()
    for name, expected in call().items():
        assert_same_bits(name, real(results[name]), real(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("operator", FILTERS)
def test_cpu_and_gpu_agree(operator):
    case = FilterCase(operator, 33, 500, 2, 3, rank=2)
    tensors, dout = filter_inputs(case, "cpu")
    on_cpu = with_gradients(ours(case), tensors, {"out": dout})
    on_gpu = with_gradients(ours(case), {n: x.cuda() for n, x in tensors.items()}, {"out": dout.cuda()})
    for name, expected in on_cpu.items():
        limit = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(on_gpu[name].cpu(), expected, rtol=1e-4, atol=limit, msg=lambda m, n=name: n + m)
