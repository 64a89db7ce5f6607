"""Keys that come in parts give what they give at once: packseq::attention_accumulate, _finish, _delta, and back."""

import math

import packseq
import pytest
import torch
from cases import MASKS
from compare import assert_same_bits
from operators import boundaries, statistics
from torch import Tensor

accumulate = torch.ops.packseq.attention_accumulate
accumulate_backward = torch.ops.packseq.attention_accumulate_backward
finish = torch.ops.packseq.attention_finish
delta_of = torch.ops.packseq.attention_delta
FIELDS = ("causal", "left", "right", "sink_tokens", "softcap", "alibi_slopes", "scale")
LENGTHS = (300, 0, 65, 1, 130)


def draws(dtype: torch.dtype, device: str, heads: int, kv_heads: int, dim: int, dim_v: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(3)
    rows = sum(LENGTHS)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=statistics(dtype)).to(dtype)

    return [draw(rows, heads, dim), draw(rows, kv_heads, dim), draw(rows, kv_heads, dim_v), draw(rows, heads, dim_v)]


def options_of(mask: dict, heads: int, device: str, dtype: torch.dtype) -> dict:
    options = {name: x for name, x in mask.items() if name not in ("alibi", "sinks")}
    if mask.get("alibi"):
        slopes = torch.logspace(-1, -4, heads, base=2, device=device, dtype=statistics(dtype))
        options["alibi_slopes"] = slopes
    return options


def as_arguments(options: dict) -> list:
    left, right = (-1 if x is None else x for x in options.get("window", (None, None)))
    defaults = {"causal": False, "sink_tokens": 0, "softcap": 0.0, "alibi_slopes": None, "scale": None}
    return [(defaults | options | {"left": left, "right": right})[name] for name in FIELDS]


def runs(parts: int) -> list[list[tuple[int, int]]]:
    """Every sequence cut into so many runs, some empty: where each begins and ends."""
    return [[(n * i // parts, n * (i + 1) // parts) for i in range(parts)] for n in LENGTHS]


def in_parts(q: Tensor, k: Tensor, v: Tensor, arguments: list, dout: Tensor, parts: int) -> list[Tensor]:
    """Every part of the keys for all queries, these cut in parts of their own: out, lse, dq, dk, dv."""
    kind = statistics(q.dtype)
    total = q.new_full((*q.shape[:2], v.shape[2]), math.nan, dtype=kind)  # not read before the first key
    sums = torch.stack([q.new_full(q.shape[:2], -math.inf, dtype=kind), q.new_zeros(q.shape[:2], dtype=kind)], 2)
    begins = boundaries(LENGTHS, "cpu").tolist()
    cuts = runs(parts)
    calls = []
    for turn in range(parts):  # run i of the queries meets run i + turn of the keys
        rows, q_bounds, k_bounds, positions = [], [0], [0], []
        for sequence, cut in enumerate(cuts):
            for i, (begin, end) in enumerate(cut):
                k_begin, k_end = cut[(i + turn) % parts]
                rows += range(begins[sequence] + k_begin, begins[sequence] + k_end)
                q_bounds.append(q_bounds[-1] + end - begin)
                k_bounds.append(k_bounds[-1] + k_end - k_begin)
                positions.append((begin, k_begin))
        tensors = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in (q_bounds, k_bounds, positions)]
        calls.append((torch.tensor(rows, device=q.device), tensors))
        accumulate(q, k[rows], v[rows], total, sums, *tensors, *arguments)
    out, lse = q.new_empty(total.shape), sums.new_empty(q.shape[:2])
    finish(total, sums, None, out, lse)
    delta = delta_of(dout, out)
    dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x in (q, k, v))
    for rows, tensors in calls:
        dkeys, dvalues = (torch.full_like(x[rows], math.nan, dtype=kind) for x in (k, v))
        accumulate_backward(dout, delta, q, k[rows], v[rows], lse, dq, dkeys, dvalues, False, *tensors, *arguments)
        dk[rows] += dkeys
        dv[rows] += dvalues
    return [out, lse, *(x.to(q.dtype) for x in (dq, dk, dv))]


def at_once(q: Tensor, k: Tensor, v: Tensor, options: dict, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = packseq.attention(*leaves, boundaries(LENGTHS, q.device), **options, return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        *(("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 2, 64, 64), (2, 2, 40, 72), (2, 1, 128, 128)], ids=str)
def test_parts_are_as_accurate_as_the_whole(device, mask, dtype, shape):
    *tensors, dout = draws(dtype, device, *shape)
    options = options_of(MASKS[mask], shape[0], device, dtype)
    whole = at_once(*tensors, options, dout)
    exact_options = {n: x.cpu().double() if isinstance(x, Tensor) else x for n, x in options.items()}
    exact = at_once(*(x.cpu().double() for x in tensors), exact_options, dout.cpu().double())
    for parts in (1, 3):
        got = in_parts(*tensors, as_arguments(options), dout, parts)
        for name, x, one, right in zip(("out", "lse", "dq", "dk", "dv"), got, whole, exact, strict=True):
            finite = right.isfinite()
            assert torch.equal(x.cpu().isfinite(), finite), name
            errors = [torch.where(finite, (y.cpu().double() - right).abs(), 0).max().item() for y in (x, one)]
            most = right[finite].abs().max().item()
            limit = 1.2 * errors[1] + (4 if dtype == torch.float64 else 1) * torch.finfo(x.dtype).eps * most
            limit += 128 * torch.finfo(statistics(dtype)).eps  # where a row sees one key, dq and dk are differences
            assert errors[0] <= limit, f"{name} in {parts} parts: {errors[0]:.3e} > {limit:.3e}, whole {errors[1]:.3e}"


def test_parts_give_the_same_bits_every_time(device):
    *tensors, dout = draws(torch.bfloat16, device, 4, 2, 64, 64)
    first, second = (in_parts(*tensors, as_arguments(MASKS["causal"]), dout, 3) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert_same_bits("parts", x, y)


def test_rows_that_see_no_key_and_slack_rows_stay_as_they_are(device):
    q, k, v = (torch.randn(9, 2, 16, device=device) for _ in range(3))
    q[7:], k[4:], v[4:] = torch.nan, torch.nan, torch.nan
    out, sums = torch.full((9, 2, 16), 3.0, device=device), torch.full((9, 2, 2), 1.0, device=device)
    tensors = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3, 7], [0, 0, 4], [[0, 0], [0, 2]])]
    accumulate(q, k, v, out, sums, *tensors, True, -1, -1, 0, 0.0, None, None)
    seen = [5, 6]  # the second sequence's rows 0 .. 3 stand level with its keys -2 .. 1
    rest = [i for i in range(9) if i not in seen]
    assert (out[rest] == 3).all()
    assert (sums[rest] == 1).all()
    assert (out[seen] != 3).all()
    dq, dk, dv = (torch.full((9, 2, 16), 3.0, device=device) for _ in range(3))
    lse, delta = (torch.zeros(9, 2, device=device) for _ in range(2))
    accumulate_backward(q, delta, q, k, v, lse, dq, dk, dv, True, *tensors, True, -1, -1, 0, 0.0, None, None)
    assert (dq[rest] == 3).all()
    assert (dq[seen] != 3).any()
    assert (dk[2:] == 3).all()
    assert (dv[:2] != 3).any()
    assert not any(x.isnan().any() for x in (out, sums, dq, dk, dv))


def good(device: str) -> dict[str, Tensor]:
    arguments = {name: torch.randn(4, 2, 16, device=device) for name in "qkv"}
    arguments |= {"out": torch.zeros(4, 2, 16, device=device), "sums": torch.zeros(4, 2, 2, device=device)}
    bounds = torch.tensor([0, 4], dtype=torch.int32, device=device)
    arguments |= {"cu_seqlens": bounds, "cu_seqlens_k": bounds.clone()}
    return arguments | {"positions": torch.zeros(1, 2, dtype=torch.int32, device=device)}


REST = (True, -1, -1, 0, 0.0, None, None)


def test_opcheck(device):
    q, k, v, out, sums, *bounds = good(device).values()
    torch.library.opcheck(accumulate.default, (q, k, v, out, sums, *bounds, *REST))
    lse, delta = torch.zeros(2, 4, 2, device=device).unbind()
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    tensors = (torch.randn_like(q), delta, q, k, v, lse.clone(), *gradients)
    torch.library.opcheck(accumulate_backward.default, (*tensors, True, *bounds, *REST))


def test_there_is_no_gradient(device):
    arguments = good(device)
    arguments["k"].requires_grad_()
    with pytest.raises(NotImplementedError, match="attention_accumulate: there is no gradient, k must not require one"):
        accumulate(*arguments.values(), *REST)


BAD = {
    "out-dtype": ({"out": lambda x: x.bfloat16()}, "out must be float32"),
    "out-shape": ({"out": lambda x: x[:, :, :8]}, "out must have shape"),
    "sums-shape": ({"sums": lambda x: x[..., 0]}, "sums must have shape"),
    "out-strided": ({"out": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)}, "out must be contiguous"),
    "positions-shape": ({"positions": lambda x: x[:, :1]}, "positions must have shape"),
    "positions-dtype": ({"positions": lambda x: x.long()}, "positions must be int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(device, name):
    changes, message = BAD[name]
    arguments = good(device)
    accumulate(*arguments.values(), *REST)
    arguments |= {n: change(arguments[n]) for n, change in changes.items()}
    with pytest.raises(ValueError, match=f"attention_accumulate: {message}"):
        accumulate(*arguments.values(), *REST)


def test_sums_at_odd_addresses(device):
    arguments = good(device)
    expected = {name: arguments[name].clone() for name in ("out", "sums")}
    accumulate(*(arguments | expected).values(), *REST)
    for name in ("out", "sums"):
        x = torch.zeros(arguments[name].numel() + 1, device=device)[1:].view(arguments[name].shape)
        odd = arguments | {n: torch.zeros_like(zeros) for n, zeros in expected.items()} | {name: x}
        if device == "cuda":
            with pytest.raises(ValueError, match=f"attention_accumulate: {name} must begin at a multiple of 16 bytes"):
                accumulate(*odd.values(), *REST)
        else:
            accumulate(*odd.values(), *REST)
            assert_same_bits(name, x, expected[name])


# ---- what comes before and after

EVERY_DTYPE = [
    *(("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


def some_sums(device: str, kind: torch.dtype, dim_v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums relative to powers of two far apart, sinks far above and far below them, and rows without any key."""
    generator = torch.Generator().manual_seed(1)
    total = torch.randn(37, 3, dim_v, generator=generator, dtype=kind)
    level = torch.randint(-300, 300, (37, 3), generator=generator).to(kind)
    weight = torch.rand(37, 3, generator=generator, dtype=kind) + 0.5
    total[::5], level[::5], weight[::5] = math.nan, -math.inf, 0
    sinks = torch.tensor([-math.inf, -3.0, 150.0], dtype=kind)
    return total.to(device), torch.stack([level, weight], 2).to(device), sinks.to(device)


@pytest.mark.parametrize(("device", "dtype"), EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dim_v", [8, 72, 128])
def test_finish(device, dtype, with_sinks, dim_v):
    total, sums, sinks = some_sums(device, statistics(dtype), dim_v)
    runs = []
    for _ in range(2):
        out, lse = (torch.full(shape, math.nan, device=device) for shape in (total.shape, total.shape[:2]))
        out, lse = out.to(dtype), lse.to(total.dtype)
        finish(total, sums, sinks if with_sinks else None, out, lse)
        runs.append((out, lse))
    for first, second in zip(*runs, strict=True):
        assert_same_bits("finish", first, second)

    level, weight = (x.cpu().double() for x in sums.unbind(2))
    lse_of_keys = level * math.log(2) + weight.log()
    expected = lse_of_keys
    if with_sinks:
        expected = torch.logaddexp(lse_of_keys, sinks.cpu().double())
    by = torch.where(weight == 0, 0, (lse_of_keys - expected).exp() / weight)[..., None]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=4 * torch.finfo(lse.dtype).eps, atol=1e-6)
    right = torch.where(by == 0, 0, total.cpu().double() * by)
    torch.testing.assert_close(out.cpu().double(), right, rtol=max(eps, 4e-5 if with_sinks else 1e-6), atol=eps / 8)
    assert (out[::5] == 0).all()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_finish_hides_no_nan(device, with_sinks):
    total, sums, sinks = some_sums(device, torch.float32, 16)
    total[1:3], sums[1, :, 1] = math.nan, math.nan
    sums[2] = torch.tensor([-math.inf, math.nan])  # scores that all are NaN have no largest
    out, lse = torch.empty_like(total), torch.empty(total.shape[:2], device=device)
    finish(total, sums, sinks if with_sinks else None, out, lse)
    assert out[1:3].isnan().all()
    assert lse[1:3].isnan().all()
    assert not out[3:].isnan().any()
    assert not lse[3:].isnan().any()


@pytest.mark.parametrize(("device", "dtype"), EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("dim_v", [8, 72, 128])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_delta(device, dtype, dim_v, with_dlse):
    generator = torch.Generator().manual_seed(2)
    kind = statistics(dtype)
    dout = torch.randn(3, 41, dim_v, generator=generator, dtype=kind).to(device, dtype).transpose(0, 1)
    out = torch.randn(41, 3, dim_v, generator=generator, dtype=kind).to(device, dtype)
    dlse = torch.randn(41, 3, generator=generator, dtype=kind).to(device) if with_dlse else None
    delta = delta_of(dout, out, dlse)
    assert (delta.dtype, delta.shape) == (kind, (41, 3))
    assert_same_bits("delta", delta, delta_of(dout.contiguous(), out, dlse))
    expected = (dout.cpu().double() * out.cpu().double()).sum(2) - (dlse.cpu().double() if with_dlse else 0)
    most = (dout.cpu().double() * out.cpu().double()).abs().sum(2)
    assert ((delta.cpu().double() - expected).abs() <= 16 * torch.finfo(kind).eps * (most + 1)).all()


@pytest.mark.parametrize("shape", [(0, 3, 16), (5, 0, 16), (0, 0, 16)], ids=str)
def test_no_rows_and_no_heads(device, shape):
    out = torch.empty(shape, device=device)
    finish(torch.empty_like(out), torch.empty(*shape[:2], 2, device=device), None, out, out.new_empty(shape[:2]))
    assert delta_of(out, out).shape == shape[:2]


def test_opcheck_of_finish_and_delta(device):
    total, sums, sinks = some_sums(device, torch.float32, 16)
    total, sums = total[1:5].contiguous(), sums[1:5].contiguous()  # those without NaN, which is not equal to itself
    out, lse = torch.ones_like(total, dtype=torch.bfloat16), torch.ones_like(total[:, :, 0])
    torch.library.opcheck(finish.default, (total, sums, sinks, out, lse))
    torch.library.opcheck(delta_of.default, (out, out.clone(), lse))
    with pytest.raises(NotImplementedError, match="attention_delta: there is no gradient, out must not require one"):
        delta_of(out, out.clone().requires_grad_())


BAD_FINISH = {
    "total-dtype": ("total", lambda x: x.bfloat16(), "total must be float32"),
    "total-shape": ("total", lambda x: x[:, :, :8], "total must have shape"),
    "sums-shape": ("sums", lambda x: x[..., :1], "sums must have shape"),
    "sinks-shape": ("sinks", lambda x: x[:2], "sinks must have shape"),
    "sinks-dtype": ("sinks", lambda x: x.double(), "sinks must be float32"),
    "out-dims": ("out", lambda x: x[0], "out must be"),
    "out-dtype": ("out", lambda x: x.long(), "out must be"),
    "out-strided": ("out", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "out must be contiguous"),
    "lse-shape": ("lse", lambda x: x[1:], "lse must have shape"),
    "lse-strided": ("lse", lambda x: x.T.contiguous().T, "lse must be contiguous"),
}


@pytest.mark.parametrize("name", BAD_FINISH)
def test_bad_input_of_finish(device, name):
    argument, change, message = BAD_FINISH[name]
    good = dict(zip(("total", "sums", "sinks"), some_sums(device, torch.float32, 16), strict=True))
    good |= {"out": torch.empty(37, 3, 16, device=device), "lse": torch.empty(37, 3, device=device)}
    finish(*good.values())
    with pytest.raises(ValueError, match=f"attention_finish: {message}"):
        finish(*(good | {argument: change(good[argument])}).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dout": (9, 2, 8)}, "dout must have shape"),
        ({"dout": torch.bfloat16}, "dout must be float32"),
        ({"dlse": (9, 2, 1)}, "dlse must have shape"),
        ({"dlse": torch.float64}, "dlse must be float32"),
        ({"out": torch.int32, "dout": torch.int32}, "out must be"),
    ],
    ids=str,
)
def test_bad_input_of_delta(device, changes, message):
    arguments = {"dout": torch.zeros(9, 2, 16), "out": torch.zeros(9, 2, 16), "dlse": torch.zeros(9, 2)}
    for name, to in changes.items():
        arguments[name] = arguments[name].to(to) if isinstance(to, torch.dtype) else torch.zeros(to)
    with pytest.raises(ValueError, match=f"attention_delta: {message}"):
        delta_of(*(x.to(device) for x in arguments.values()))


@pytest.mark.gpu
def test_head_dims_that_a_gpu_has_no_kernels_for():
    x = torch.zeros(4, 2, 12, device="cuda")
    with pytest.raises(ValueError, match="out must have a head dim of at least 1, a multiple of 8 on a GPU, got 12"):
        delta_of(x, x)
