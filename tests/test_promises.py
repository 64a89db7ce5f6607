"""What every operator promises (see "Promises" in the README), each a test over every registered operator."""

import math
from functools import partial

import pytest
import torch
from compare import assert_same_bits
from operators import (
    OPERATORS,
    Operator,
    Rows,
    batch,
    boundaries,
    captured,
    draw,
    free_memory,
    pack,
    rows_of,
    run,
    split,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InductorError
from torch.utils._python_dispatch import TorchDispatchMode

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTHS = [70, 1, 0, 200, 64, 33]  # several tiles long, one row, none
SHORT = [5, 0, 3, 8]

every_operator = pytest.mark.parametrize("op", OPERATORS, ids=str)
every_computation = pytest.mark.parametrize("op", [op for op in OPERATORS if not op.moves], ids=str)
every_differentiable = pytest.mark.parametrize("op", [op for op in OPERATORS if not op.inference], ids=str)
every_differentiable_computation = pytest.mark.parametrize(
    "op", [op for op in OPERATORS if not (op.moves or op.inference)], ids=str
)
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t).removeprefix("torch."))
narrow_and_wide = pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda t: str(t).removeprefix("torch."))


def assert_same_results(what: str, got: dict, expected: dict, names=None) -> None:
    for name in names or expected:
        assert_same_bits(f"{what}: {name}", got[name], expected[name])


def loss_of(outputs) -> torch.Tensor:
    """Of every element, but the infinite ones."""
    reals = [torch.view_as_real(x) if x.is_complex() else x for x in outputs]
    return sum(torch.nan_to_num(x.float(), neginf=0).square().sum() for x in reals)


def alone(op: Operator, lengths: list[int], dtype: torch.dtype, device: str) -> list[dict[str, torch.Tensor]]:
    """The results of each sequence run by itself."""
    results = []
    for seed, n in enumerate(lengths):
        one = pack(op, [n], [draw(op, n, dtype, seed)], dtype, device)
        results.append(split(op, [n], run(op, one))[0][0])
    return results


# ---- 1. Isolation


@every_operator
@narrow_and_wide
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_a_sequence_never_reaches_another(op, dtype, device, poison):
    sequences = [draw(op, n, dtype, seed) for seed, n in enumerate(LENGTHS)]
    clean, _ = split(op, LENGTHS, run(op, pack(op, LENGTHS, sequences, dtype, device)))
    for sick in range(len(LENGTHS)):
        poisoned = list(sequences)
        poisoned[sick] = {name: torch.full_like(x, poison) for name, x in sequences[sick].items()}
        results, _ = split(op, LENGTHS, run(op, pack(op, LENGTHS, poisoned, dtype, device)))
        for i in range(len(LENGTHS)):
            if i != sick:
                assert_same_results(f"sequence {i} beside the poisoned {sick}", results[i], clean[i])


# ---- 2. Packing invariance


@every_operator
@every_dtype
def test_a_sequence_gives_the_same_bits_alone_and_in_any_pack(op, dtype, device):
    seeds = list(enumerate(LENGTHS))
    expected = alone(op, LENGTHS, dtype, device)
    for turn in range(len(seeds)):
        order = seeds[turn:] + seeds[:turn]
        if turn % 2:
            order.reverse()
        lengths = [n for _, n in order]
        sequences = [draw(op, n, dtype, seed) for seed, n in order]
        results, _ = split(op, lengths, run(op, pack(op, lengths, sequences, dtype, device)))
        for (seed, _), result in zip(order, results, strict=True):
            assert_same_results(f"sequence {seed} among {lengths}", result, expected[seed])


@every_operator
@narrow_and_wide
def test_a_sequence_gives_the_same_bits_among_a_thousand(op, dtype, device):
    lengths = [n % 7 for n in range(1000)] + [300]
    sequences = [draw(op, n, dtype) for n in range(7)]
    chosen = [sequences[n] for n in lengths[:-1]] + [draw(op, 300, dtype)]
    results, _ = split(op, lengths, run(op, pack(op, lengths, chosen, dtype, device)))
    for i in (1, 2, 3, 500, 999, 1000):
        one = pack(op, [lengths[i]], [chosen[i]], dtype, device)
        assert_same_results(f"sequence {i}", results[i], split(op, [lengths[i]], run(op, one))[0][0])


# ---- 3. Repeatability


@every_operator
@every_dtype
def test_every_run_gives_the_same_bits(op, dtype, device):
    lengths = [*LENGTHS, 500, 3, 129]
    expected = run(op, batch(op, lengths, dtype, device))
    for i in range(10 if device == "cuda" else 2):
        assert_same_results(f"run {i}", run(op, batch(op, lengths, dtype, device)), expected)


@every_operator
def test_the_number_of_threads_changes_no_bit(op):
    expected = run(op, batch(op, LENGTHS, F32, "cpu"))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert_same_results(f"{n} threads", run(op, batch(op, LENGTHS, F32, "cpu")), expected)
    finally:
        torch.set_num_threads(threads)


# ---- 4. Slack rows


@every_operator
@every_dtype
@pytest.mark.parametrize("slack", [1, 300])
def test_slack_rows_are_never_read_and_come_back_as_zeros(op, dtype, device, slack):
    expected = run(op, batch(op, LENGTHS, dtype, device))
    results = run(op, batch(op, LENGTHS, dtype, device, slack))  # NaN in inputs and gradients
    parts, rest = split(op, LENGTHS, results)
    for i, part in enumerate(split(op, LENGTHS, expected)[0]):
        assert_same_results(f"sequence {i}", parts[i], part)
    for name, rows in rest.items():
        assert len(rows) == (0 if rows_of(op)[name].of == "sequences" else slack)
        assert_same_bits(f"slack of {name}", rows, torch.zeros_like(rows))
    for name in op.shared if not op.inference else ():
        torch.testing.assert_close(results["d" + name], expected["d" + name])


# ---- 5. Empty things


@every_operator
@narrow_and_wide
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 5, 0], [1], [0, 0, 1, 0, 0, 0, 0], [2, 0, 0, 1]], ids=str)
def test_empty_things_work(op, dtype, device, lengths, slack):
    results = run(op, batch(op, lengths, dtype, device, slack))
    parts, rest = split(op, lengths, results)
    for i, one in enumerate(alone(op, lengths, dtype, device)):
        assert_same_results(f"sequence {i}", parts[i], one)
    for name, rows in rest.items():
        assert (rows == 0).all(), name
    for name in op.shared if not op.inference else ():
        assert results["d" + name].isfinite().all(), name


# ---- 6. CUDA graphs


@pytest.mark.gpu
@every_operator
@narrow_and_wide
def test_a_captured_graph_replays_with_other_boundaries(op, dtype):
    lengths, others = [90, 0, 41, 300, 5, 64], [[300, 64, 90, 0, 41, 5], [0, 0, 0, 0, 0, 7], [500, 0, 0, 0, 0, 0]]
    slack = 400  # room for every other, keys too
    static = batch(op, lengths, dtype, "cuda", slack)

    def fill(values: list[int]) -> dict:
        """Boundaries of `values` into the captured tensors; beyond them the rows stay what they are."""
        for name, count in op.lengths.items():
            static.arguments[name].copy_(boundaries([count(n) for n in values]))
        with torch.no_grad():
            for tensors in (static.arguments, static.gradients):
                for x in tensors.values():
                    if x.is_floating_point() or x.is_complex():
                        (torch.view_as_real(x) if x.is_complex() else x).nan_to_num_(0.25)

    fill(lengths)
    graph, results = captured(partial(run, op, static))
    for values in [*others, lengths]:
        fill(values)
        graph.replay()
        torch.cuda.synchronize()
        replayed = {name: x.clone() for name, x in results.items()}
        assert_same_results(f"boundaries of {values}", replayed, run(op, static))


# ---- 7. Beyond 2^31 elements


@pytest.mark.big
@pytest.mark.parametrize("op", [op for op in OPERATORS if op.big], ids=str)
@narrow_and_wide
def test_offsets_beyond_two_to_the_31(op, device, dtype):
    """Many sequences of zeros, whose last has an offset that 32 bits cannot hold in any tensor of tokens, nor, of a
    step, in its states."""
    named = {**op.inputs, **op.outputs}
    width = {name: math.prod(rows.shape) for name, rows in named.items()}
    of_tokens = min(width[name] for name, rows in named.items() if rows.of != "sequences" and not rows.statistics)
    length, tail = 1024 if device == "cuda" else 64, 100
    if op.inference:  # as short as lets the states have no fewer elements
        length = max(1, min(width[name] for name, rows in named.items() if rows.of == "sequences") // of_tokens)
    count = 2**31 // (of_tokens * length) + 1
    elements = {name: count * op.count(rows, length) * width[name] for name, rows in named.items()}
    needed = sum(n * op.dtype_of(name, dtype).itemsize for name, n in elements.items())
    if not op.inference:  # the gradients of both, and an accumulator in float32
        needed = 3 * needed + 2 * sum(elements.values())
    if free_memory(device) < needed:
        pytest.skip(f"needs {needed >> 30} GiB of memory")
    b = pack(op, [tail], [draw(op, tail, dtype)], dtype, device)
    [expected], _ = split(op, [tail], run(op, b))

    def widen(x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return torch.cat([x.new_zeros(count * op.count(rows, length), *x.shape[1:]), x])

    with torch.no_grad():
        for name, rows in op.inputs.items():
            b.arguments[name] = widen(b.arguments[name].detach(), rows)
        for name, rows in op.outputs.items() if not op.inference else ():
            b.gradients[name] = widen(b.gradients[name], rows)
        for name, f in op.lengths.items():
            counts = torch.tensor([0, f(length), f(tail)]).repeat_interleave(torch.tensor([1, count, 1]))
            b.arguments[name] = counts.cumsum(0).int().to(device)
    for name in op.inputs if not op.inference else ():
        b.arguments[name].requires_grad_()
    results = run(op, b)
    for name, rows in rows_of(op).items():
        assert_same_bits(name, results[name][-op.count(rows, tail) :], expected[name])


# ---- 8. Bad input


@every_computation
def test_bad_input_is_named(op, device):
    good = batch(op, SHORT, F32, device).detached()
    for name in [*op.inputs, *op.shared, *op.constants]:
        for change in (lambda x: (x.real if x.is_complex() else x).int(), lambda x: x[None], lambda x: x[..., None]):
            with pytest.raises(ValueError, match=r": \w+ must"):
                op.call(**good | {name: change(good[name])})
        with pytest.raises(ValueError, match=f": {name} must"):
            op.call(**good | {name: good[name][None]})
    for name in op.lengths:
        for change in (lambda x: x.long(), lambda x: x[None], lambda x: x[:0], lambda x: x.repeat_interleave(2)[::2]):
            with pytest.raises(ValueError, match=f": {name} must"):
                op.call(**good | {name: change(good[name])})


@every_computation
def test_bad_boundaries_are_named(op, device, monkeypatch):
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")  # the CPU needs no asking
    good = batch(op, SHORT, F32, device).detached()
    op.call(**good)
    for name in op.lengths:
        for position, value in ((0, -1), (0, 1), (2, -7), (1, 2**31 - 1), (len(SHORT), 10_000)):
            bad = good[name].clone()
            bad[position] = value
            with pytest.raises(ValueError, match=rf": {name} must .* got"):
                op.call(**good | {name: bad})


@pytest.mark.gpu
@every_operator
@narrow_and_wide
def test_malformed_boundaries_never_leave_the_tensors(op, dtype, monkeypatch):
    """Whatever they hold: the call comes back, memory of others stays as it was, and the next call is right."""
    monkeypatch.delenv("PACKSEQ_VALIDATE", raising=False)
    expected = run(op, batch(op, LENGTHS, dtype, "cuda"))
    neighbours = [torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda") for _ in range(8)]
    generator = torch.Generator().manual_seed(0)
    for attempt in range(30):
        b = batch(op, LENGTHS, dtype, "cuda")
        for name in op.lengths:
            n = len(b.arguments[name])
            total = int(b.arguments[name][-1])
            low, high = [(-(2**31), 2**31 - 1), (-50, total + 50), (0, total)][attempt % 3]
            b.arguments[name].copy_(torch.randint(low, high + 1, (n,), generator=generator).int())
        run(op, b)
        torch.cuda.synchronize()
    assert all(bool((x == 7).all()) for x in neighbours)
    assert_same_results("a good call afterwards", run(op, batch(op, LENGTHS, dtype, "cuda")), expected)


# ---- 9. Differentiable everywhere


@every_differentiable
def test_every_output_has_the_right_gradient(op):
    b = batch(op, [3, 0, 1, 4], torch.float64, "cpu")
    leaves = [b.arguments[name] for name in b.differentiable]
    fixed = {name: x for name, x in b.arguments.items() if name not in b.differentiable}

    def function(*leaves):
        outputs = op.call(**dict(zip(b.differentiable, leaves, strict=True)), **fixed)
        return tuple(x if x.is_complex() else x.clamp(min=-1e3) for x in outputs)  # differences of -inf are none

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@every_differentiable_computation
def test_a_second_derivative_raises(op, device):
    b = batch(op, SHORT, F32, device)
    leaves = [b.arguments[name] for name in b.differentiable]
    first = torch.autograd.grad(loss_of(op.call(**b.arguments)), leaves, create_graph=True)
    with pytest.raises(NotImplementedError):
        torch.autograd.grad(loss_of(first), leaves)


@pytest.mark.parametrize("op", [op for op in OPERATORS if op.inference], ids=str)
def test_what_has_no_gradient_raises(op, device):
    good = batch(op, SHORT, F32, device).arguments
    for name in [*op.inputs, *op.shared]:
        with pytest.raises(NotImplementedError, match=f"{name} must not require one"):
            op.call(**good | {name: good[name].detach().requires_grad_()})


# ---- 10. PyTorch citizens


class Recorder(TorchDispatchMode):
    """The calls of our operators, as the dispatcher sees them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "packseq":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def recorded_calls(op: Operator, device: str, dtype: torch.dtype) -> list:
    with Recorder() as recorder:
        run(op, batch(op, SHORT, dtype, device, slack=2))
    assert len(recorder.calls) >= (1 if op.inference else 2)  # forward and backward
    return recorder.calls


@every_operator
@narrow_and_wide
def test_opcheck(op, device, dtype):
    for function, args, kwargs in recorded_calls(op, device, dtype):
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(function, detached, kwargs)


@every_differentiable
def test_opcheck_with_gradients(op, device):
    function, args, kwargs = recorded_calls(op, device, F32)[0]
    with_grad = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args]
    assert any(isinstance(x, torch.Tensor) and x.requires_grad for x in with_grad)
    torch.library.opcheck(function, with_grad, kwargs)


@every_operator
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_recompiles_once(op, device, backend, request):
    if backend == "inductor" and op.inference and op.complex:
        # It takes no operator that updates a tensor in place beside complex ones. The day it does, this fails.
        request.applymarker(pytest.mark.xfail(raises=InductorError, strict=True))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(op.call, fullgraph=True, backend=counter)
    for lengths in ([5, 3, 8], [4, 0, 2, 9, 7], [6, 20], [31, 2, 2, 2, 2, 17, 90]):
        expected = run(op, batch(op, lengths, F32, device))
        got = run(op, batch(op, lengths, F32, device), compiled)
        if backend == "inductor" and op.composed:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        else:
            assert_same_results(f"lengths {lengths}", got, expected)
    assert counter.frame_count <= 2, "recompiled more than once"


class Module(torch.nn.Module):
    def __init__(self, op: Operator):
        super().__init__()
        self.op = op

    def forward(self, arguments: dict[str, torch.Tensor]):
        return self.op.call(**arguments)


@every_operator
def test_exports(op, device):
    arguments = batch(op, [5, 3, 8], F32, device).detached()
    moving = {*op.inputs, *op.lengths}
    sizes = {name: {0: torch.export.Dim.DYNAMIC} if name in moving else None for name in arguments}
    program = torch.export.export(Module(op), (arguments,), dynamic_shapes=(sizes,))
    for lengths in ([5, 3, 8], [4, 0, 2, 9, 7]):
        arguments = batch(op, lengths, F32, device).detached()
        for name, got, expected in zip(op.outputs, program.module()(arguments), op.call(**arguments), strict=True):
            assert_same_bits(name, got, expected)


@every_operator
@narrow_and_wide
def test_meta_tensors_know_the_results(op, device, dtype):
    b = batch(op, SHORT, dtype, device)
    expected = run(op, b)
    outputs = op.call(**b.arguments)
    on_meta = {name: x.detach().to("meta") for name, x in b.arguments.items()}
    for name in b.differentiable:
        on_meta[name].requires_grad_()
    results = op.call(**on_meta)
    for meta, real in zip(results, outputs, strict=True):
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
    if op.inference:
        return
    grads = torch.autograd.grad(results, [on_meta[n] for n in b.differentiable], [x.detach() for x in results])
    for name, meta in zip(b.differentiable, grads, strict=True):
        real = expected["d" + name]
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride()), name


@every_computation
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(op, device, compiled):
    b = batch(op, SHORT, F32, device)
    call = torch.compile(op.call, fullgraph=True, backend="aot_eager") if compiled else op.call
    with torch.autocast(device, dtype=BF16):
        outputs = call(**b.arguments)
    narrow = {
        name: x.detach().to(BF16) if name in op.inputs and not op.inputs[name].statistics else x.detach()
        for name, x in b.arguments.items()
    }
    for name, got, expected in zip(op.outputs, outputs, op.call(**narrow), strict=True):
        assert_same_bits(name, got, expected)
    if op.inference:
        return
    leaves = [b.arguments[name] for name in b.differentiable]
    for name, leaf, grad in zip(b.differentiable, leaves, torch.autograd.grad(loss_of(outputs), leaves), strict=True):
        assert (grad.dtype, bool(grad.isfinite().all())) == (leaf.dtype, True), name


# ---- 11. The same on the CPU

CLOSE = {F32: {"rtol": 1e-4, "atol": 1e-5}, BF16: {"rtol": 2e-2, "atol": 2e-2}, F16: {"rtol": 3e-3, "atol": 3e-3}}


@pytest.mark.gpu
@every_operator
@every_dtype
def test_cpu_and_gpu_agree(op, dtype):
    on_cpu = run(op, batch(op, LENGTHS, dtype, "cpu", slack=5))
    on_gpu = run(op, batch(op, LENGTHS, dtype, "cuda", slack=5))
    for name, expected in on_cpu.items():
        scale = expected[expected.isfinite()].abs().max().item()
        limits = CLOSE[dtype] | {"atol": CLOSE[dtype]["atol"] * max(1.0, scale)}
        torch.testing.assert_close(on_gpu[name].cpu(), expected, **limits, msg=lambda m, name=name: f"{name}: {m}")
