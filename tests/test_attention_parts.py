"""packseq::attention_accumulate and its backward: keys that come in parts give what they give at once."""

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
    out = q.new_full((*q.shape[:2], v.shape[2]), math.nan, dtype=kind)  # not read before the first key
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
        accumulate(q, k[rows], v[rows], out, sums, *tensors, *arguments)
    level, weight = sums.unbind(2)
    lse = level * math.log(2) + weight.log()
    out = torch.where(weight[..., None] == 0, 0, out / weight[..., None])
    delta = (out.to(q.dtype).to(kind) * dout.to(kind)).sum(2)
    dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x in (q, k, v))
    for rows, tensors in calls:
        dkeys, dvalues = (torch.full_like(x[rows], math.nan, dtype=kind) for x in (k, v))
        accumulate_backward(dout, delta, q, k[rows], v[rows], lse, dq, dkeys, dvalues, False, *tensors, *arguments)
        dk[rows] += dkeys
        dv[rows] += dvalues
    return [out.to(q.dtype), lse, *(x.to(q.dtype) for x in (dq, dk, dv))]


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
