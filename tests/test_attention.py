"""packseq.attention against float64, and what is its own: strides, options, errors. The promises that it shares with
every operator are in test_promises.py."""

import zlib

import packseq
import pytest
import reference
import torch
from bad_input import assert_raises
from cases import CPU_ONLY, EVERY_CASE, ON_CPU, Case
from compare import assert_accurate, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import boundaries, random, statistics
from torch import Tensor


def inputs_of(case: Case, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Differentiable tensors, the outputs' gradients, and the other options."""
    lengths_k = case.lengths_k or case.lengths
    total_q, total_k, dim_v = sum(case.lengths), sum(lengths_k), case.dim_v or case.dim
    kind = statistics(case.dtype)

    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def draw(*shape: int, dtype: torch.dtype = case.dtype, spread: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=statistics(case.dtype))
        return (values * spread).to(dtype)

    tensors = {
        "q": draw(total_q, case.heads, case.dim, spread=case.spread),
        "k": draw(total_k, case.kv_heads, case.dim, spread=case.spread),
        "v": draw(total_k, case.kv_heads, dim_v),
    }
    gradients = {
        "out": draw(total_q, case.heads, dim_v),
        "lse": draw(total_q, case.heads, dtype=kind),
    }
    options = dict(case.options)
    if options.pop("sinks", False):
        tensors["sinks"] = draw(case.heads, dtype=kind)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.logspace(-1, -4, case.heads, base=2, device=device, dtype=kind)
    return tensors, gradients, options


def with_gradients(function, tensors: dict[str, Tensor], gradients: dict[str, Tensor], dtype=None) -> dict[str, Tensor]:
    """Outputs, and under "d" + name the gradients of all tensors."""
    tensors = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in tensors.items()}
    out, lse = function(**tensors)
    seeds = [gradients["out"].to(out.dtype), gradients["lse"].to(lse.dtype)]
    if not out.requires_grad:  # the reference, where there are no sequences
        grads = [None for _ in tensors]
    else:
        grads = torch.autograd.grad((out, lse), list(tensors.values()), seeds, allow_unused=True)
    results = {"out": out.detach(), "lse": lse.detach()}
    for (name, x), grad in zip(tensors.items(), grads, strict=True):
        results["d" + name] = torch.zeros_like(x) if grad is None else grad
    return results


def check_case(case: Case, device: str) -> None:
    tensors, gradients, options = inputs_of(case, device)
    cu = {"cu_seqlens": boundaries(case.lengths, device)}
    if case.lengths_k:
        cu["cu_seqlens_k"] = boundaries(case.lengths_k, device)

    def ours(**x):
        return packseq.attention(**x, **cu, **options, return_lse=True)

    packed = {"lengths": case.lengths, "lengths_k": case.lengths_k}

    def plain(**x):
        return reference.attention(**x, **packed, **options)

    got = with_gradients(ours, tensors, gradients)
    exact = with_gradients(plain, tensors, gradients, torch.float64)
    theirs = with_gradients(plain, tensors, gradients)

    rounding = reference.rounding(
        {n: x.double() for n, x in tensors.items()},
        *(gradients[name].double() for name in ("out", "lse")),
        **packed,
        **options,
        ulp=torch.finfo(statistics(case.dtype)).eps,
        ulp_of_out=torch.finfo(case.dtype).eps,
    )
    for name in got:
        is_gradient = name.startswith("d")
        assert_accurate(
            *(name, got[name], exact[name], theirs[name]),
            relative=rounding["relative"] if is_gradient else 0.0,
            floor=rounding.get(name, 0.0),
        )


@pytest.mark.parametrize("case", [*ON_CPU, *CPU_ONLY], ids=str)
def test_accuracy_on_the_cpu(case):
    check_case(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_accuracy_on_the_gpu(case):
    check_case(case, "cuda")


def test_cases_have_names_of_their_own():
    names = [str(case) for case in [*EVERY_CASE, *CPU_ONLY]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"alibi": True}], ids=["full", "causal", "alibi"])
def test_the_reference_is_what_torch_computes(options):
    case = Case("torch", (7, 12), 16, torch.float64, heads=4, kv_heads=2, options=options)
    tensors, _, options = inputs_of(case, "cpu")
    out, lse = reference.attention(**tensors, lengths=case.lengths, **options)
    for rows in (slice(0, 7), slice(7, 19)):
        q, k, v = (x[rows].transpose(0, 1) for x in tensors.values())
        n = q.shape[1]
        bias = torch.zeros(4, n, n, dtype=torch.float64)
        if "alibi_slopes" in options:
            at = torch.arange(n)
            bias = -options["alibi_slopes"][:, None, None] * (at[:, None] - at[None, :]).abs()
        if options.get("causal"):
            bias = bias.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        scores = q @ k.repeat_interleave(2, 0).transpose(1, 2) / 4 + bias
        torch.testing.assert_close(out[rows].transpose(0, 1), expected)
        torch.testing.assert_close(lse[rows].transpose(0, 1), scores.logsumexp(2))


def test_gradients_by_finite_differences():
    case = Case("gradcheck", (4, 0, 1, 6), 5, torch.float64, 4, 2, 3, (6, 2, 0, 3), {"alibi": True, "sinks": True})
    tensors, _, options = inputs_of(case, "cpu")
    cu, cu_k = boundaries(case.lengths), boundaries(case.lengths_k)
    for more in ({}, {"causal": True, "window": (2, None), "sink_tokens": 1, "softcap": 1.5, "scale": 0.7}):

        def function(q, k, v, sinks, more=more):
            out, lse = packseq.attention(
                q, k, v, cu, cu_seqlens_k=cu_k, sinks=sinks, **options, **more, return_lse=True
            )
            return out, lse.clamp(min=-1e3)  # differences of -inf are none

        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


LENGTHS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 90)), max_size=6)
BOUND = st.one_of(st.none(), st.integers(0, 40))


@st.composite
def random_cases(draw) -> Case:
    lengths = (*draw(LENGTHS), 50)  # of a few rows alone, plain torch's largest error would be a matter of luck
    options = {
        "causal": draw(st.booleans()),
        "window": (draw(BOUND), draw(BOUND)),
        "sink_tokens": draw(st.sampled_from([0, 0, 1, 9])),
        "softcap": draw(st.sampled_from([0.0, 1.0, 20.0])),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.1, 0.5])),
    }
    keys = draw(st.one_of(st.none(), st.tuples(*(st.integers(0, 90) for _ in lengths))))
    kv_heads, ratio = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    dims = st.integers(1, 10).map(lambda x: 8 * x)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Case("random", lengths, draw(dims), dtype, kv_heads * ratio, kv_heads, draw(dims), keys, options)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=random_cases())
def test_accuracy_of_random_packs_on_the_cpu(case):
    check_case(case, "cpu")


@pytest.mark.gpu
@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=random_cases())
def test_accuracy_of_random_packs_on_the_gpu(case):
    check_case(case, "cuda")


# ---- gradients of one output alone


@pytest.mark.parametrize("output", [0, 1], ids=["out", "lse"])
def test_gradient_of_one_output_alone(device, output):
    case = Case("one-output", (40, 3), 32, torch.float32, options={"sinks": True})
    tensors, gradients, _ = inputs_of(case, device)
    gradients[["lse", "out"][output]].zero_()
    cu = boundaries(case.lengths, device)
    both = with_gradients(lambda **x: packseq.attention(**x, cu_seqlens=cu, return_lse=True), tensors, gradients)

    leaves = [x.requires_grad_() for x in tensors.values()]
    result = packseq.attention(**tensors, cu_seqlens=cu, return_lse=True)[output]
    alone = torch.autograd.grad(result, leaves, gradients[["out", "lse"][output]], allow_unused=True)
    for name, grad in zip(tensors, alone, strict=True):
        torch.testing.assert_close(grad, both["d" + name], rtol=0, atol=0)
    assert both["dq"].abs().max() > 0


def test_what_has_no_gradient_says_so(device):
    tensors, _, _ = inputs_of(Case("none", (5,), 8, torch.float32), device)
    cu, slopes = boundaries([5], device), torch.ones(2, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="alibi_slopes has no gradient"):
        packseq.attention(**tensors, cu_seqlens=cu, alibi_slopes=slopes)
    with torch.no_grad():
        packseq.attention(**tensors, cu_seqlens=cu, alibi_slopes=slopes)

    q = tensors["q"].requires_grad_()
    out = packseq.attention(**tensors, cu_seqlens=cu)
    [dq] = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(dq.sum(), q)


# ---- rows, options, results


def test_rows_that_see_no_key(device):
    q, k, v = (torch.randn(n, 2, 16, device=device) for n in (5, 2, 2))
    cu, cu_k = boundaries([5], device), boundaries([2], device)
    out, lse = packseq.attention(q, k, v, cu, cu_seqlens_k=cu_k, causal=True, return_lse=True)
    assert (out[:3] == 0).all()
    assert (lse[:3] == -torch.inf).all()
    assert lse[3:].isfinite().all()
    sinks = torch.tensor([0.5, -2.0], device=device)
    out, lse = packseq.attention(q, k, v, cu, cu_seqlens_k=cu_k, causal=True, sinks=sinks, return_lse=True)
    assert (out[:3] == 0).all()
    torch.testing.assert_close(lse[:3], sinks.expand(3, 2))


def test_ways_to_write_a_window(device):
    q, k, v = (torch.randn(70, 2, 16, device=device) for _ in range(3))
    cu = boundaries([50, 20], device)

    def call(**options):
        return packseq.attention(q, k, v, cu, **options)

    for window in ((None, None), (-1, -1), (2**40, 2**40), [None, -1]):
        assert_same_bits(f"window {window}", call(window=window), call())
    assert_same_bits("right", call(window=(None, 0)), call(causal=True))
    assert_same_bits("scale", call(scale=0.25), call())
    torch.testing.assert_close(call(causal=True, window=(3, None), sink_tokens=2**40), call(causal=True))


def test_results(device):
    q, k, v = (torch.randn(7, 2, d, device=device, dtype=torch.bfloat16) for d in (16, 16, 8))
    cu = boundaries([3, 4], device)
    out = packseq.attention(q, k, v, cu)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((7, 2, 8), torch.bfloat16, True)
    out, lse = packseq.attention(q, k, v, cu, return_lse=True)
    assert (lse.shape, lse.dtype) == ((7, 2), torch.float32)
    raw = torch.ops.packseq.attention(q, k, v, cu)  # every option has a default
    assert_same_bits("out", raw[0], out)


# ---- strides


def strided(kind: str, x: Tensor) -> Tensor:
    """The values of x [total, heads, dim], laid out otherwise."""
    dim = x.shape[2]
    if kind == "one of three":  # as a linear layer leaves q, k and v
        return torch.stack([x, x, x], 1)[:, 1]
    if kind == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "part of each row":
        return torch.cat([x, x], 2)[..., :dim]
    if kind == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if kind == "misaligned rows":
        return torch.cat([x, x[..., :3]], 2)[..., :dim]
    if kind == "dims first":
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    raise ValueError(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind", ["one of three", "heads first", "part of each row", "misaligned", "misaligned rows", "dims first"]
)
def test_strides_change_nothing(device, dtype, kind):
    case = Case("strided", (70, 1, 0, 30), 40, dtype, 4, 2, 24, options={"causal": True})
    tensors, gradients, options = inputs_of(case, device)
    cu = boundaries(case.lengths, device)

    def call(**x):
        return packseq.attention(**x, cu_seqlens=cu, **options, return_lse=True)

    expected = with_gradients(call, tensors, gradients)
    odd = {name: strided(kind, x) for name, x in tensors.items()}
    odd_gradients = {"out": strided(kind, gradients["out"]), "lse": gradients["lse"].t().contiguous().t()}
    assert not any(x.is_contiguous() and kind != "misaligned" for x in odd.values())
    got = with_gradients(call, odd, odd_gradients)
    for name in expected:
        assert_same_bits(name, got[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_tensors(device, dtype):
    q, k, v = (random(9, heads, 16, seed=str(heads), dtype=dtype).to(device) for heads in (4, 1, 1))
    cu, slopes = boundaries([4, 5], device), torch.tensor([0.5], device=device).expand(4)

    def gradients(q, k, v, dout, slopes):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(packseq.attention(*leaves, cu, alibi_slopes=slopes), leaves, dout)

    wide_k, wide_v = k.expand(9, 4, 16), v.expand(9, 4, 16)
    for dout in (
        torch.ones((), dtype=dtype, device=device).expand(9, 4, 16),
        random(16, seed="row", dtype=dtype).to(device).expand(9, 4, 16),
        random(9, 1, 1, seed="token", dtype=dtype).to(device).expand(9, 4, 16),
    ):
        expanded = gradients(q, wide_k, wide_v, dout, slopes)
        dense = gradients(q, wide_k.contiguous(), wide_v.contiguous(), dout.contiguous(), slopes.contiguous())
        for name, got, expected in zip(("dq", "dk", "dv"), expanded, dense, strict=True):
            assert_same_bits(name, got, expected)


# ---- errors


def good(device: str = "cpu") -> dict:
    return {
        "q": torch.zeros(6, 4, 16, device=device),
        "k": torch.zeros(6, 2, 16, device=device),
        "v": torch.zeros(6, 2, 8, device=device),
        "cu_seqlens": boundaries([2, 4], device),
    }


BAD = {
    "q-is-flat": ({"q": lambda x: x.flatten(1)}, r"q must be \[total_q, heads, dim\], got shape \[6, 64\]"),
    "q-is-int": ({"q": lambda x: x.int()}, "q must be float16, bfloat16, float32 or float64, got int32"),
    "q-has-no-heads": ({"q": lambda x: x[:, :0]}, r"q must have at least one head .*, got \[6, 0, 16\]"),
    "k-is-flat": ({"k": lambda x: x[0]}, r"k must be \[total_k, kv_heads, dim\], got shape \[2, 16\]"),
    "k-is-half": ({"k": lambda x: x.half()}, "k must be float32 like q, got float16"),
    "k-heads": ({"k": lambda x: x[:, :1].expand(-1, 3, -1)}, "k must have a number of heads that divides q's 4, got 3"),
    "k-has-no-heads": ({"k": lambda x: x[:, :0]}, "k must have a number of heads that divides q's 4, got 0"),
    "k-dim": ({"k": lambda x: x[..., :8]}, r"k must have shape \[6, 2, 16\], got \[6, 2, 8\]"),
    "k-rows": ({"k": lambda x: x[:5], "v": lambda x: x[:5]}, "k must have q's 6 rows, or cu_seqlens_k .*, got 5"),
    "v-rows": ({"v": lambda x: x[:5]}, r"v must have shape \[6, 2, 8\], got \[5, 2, 8\]"),
    "v-heads": ({"v": lambda x: x[:, :1]}, r"v must have shape \[6, 2, 8\], got \[6, 1, 8\]"),
    "v-has-no-dim": ({"v": lambda x: x[..., :0]}, "v must have a head dim of at least 1, got 0"),
    "cu-is-long": ({"cu_seqlens": lambda x: x.long()}, "cu_seqlens must be int32, got int64"),
    "cu-is-wide": ({"cu_seqlens": lambda x: x[None]}, r"cu_seqlens must be \[sequences \+ 1\], got shape \[1, 3\]"),
    "cu-is-empty": ({"cu_seqlens": lambda x: x[:0]}, "cu_seqlens must have at least one element"),
    "cu-is-strided": (
        {"cu_seqlens": lambda x: x.repeat_interleave(2)[::2]},
        "cu_seqlens must be contiguous, got stride 2",
    ),
    "cu-k-length": (
        {"cu_seqlens_k": lambda x: boundaries([6], x.device)},
        r"cu_seqlens_k must have shape \[3\], got \[2\]",
    ),
    "window-is-a-number": ({"window": 3}, r"window must be \(left, right\) or None, got 3"),
    "window-is-low": ({"window": (-2, 0)}, r"window must be two numbers .*, got \(-2, 0\)"),
    "sink-tokens": ({"sink_tokens": -1}, "sink_tokens must be at least 0, got -1"),
    "softcap": ({"softcap": -1.0}, "softcap must be finite and at least 0, got -1"),
    "scale": ({"scale": float("nan")}, "scale must be finite, got nan"),
    "slopes-shape": (
        {"alibi_slopes": lambda x: torch.zeros(3, device=x.device)},
        r"alibi_slopes must have shape \[4\], got \[3\]",
    ),
    "slopes-dtype": (
        {"alibi_slopes": lambda x: torch.zeros(4, device=x.device).half()},
        "alibi_slopes must be float32, got float16",
    ),
    "sinks-shape": (
        {"sinks": lambda x: torch.zeros(4, 1, device=x.device)},
        r"sinks must have shape \[4\], got \[4, 1\]",
    ),
    "sinks-dtype": (
        {"sinks": lambda x: torch.zeros(4, device=x.device).double()},
        "sinks must be float32, got float64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(device, name):
    changes, message = BAD[name]
    assert_raises(packseq.attention, good(device), changes, f"attention: {message}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 6], "cu_seqlens must start at 0, got 1"),
        ([0, 4, 3, 6], "cu_seqlens must not decrease, got 4 then 3 at position 2"),
        ([0, 2, 7], "cu_seqlens must end within the 6 rows there are, got 7 at position 2"),
        ([-3], "cu_seqlens must start at 0, got -3"),
    ],
)
def test_bad_boundaries(device, monkeypatch, values, message):
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")  # the CPU needs no asking
    arguments = good(device)
    bad = torch.tensor(values, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=f"attention: {message}"):
        packseq.attention(**arguments | {"cu_seqlens": bad})
    with pytest.raises(ValueError, match=f"attention: {message.replace('cu_seqlens', 'cu_seqlens_k')}"):
        packseq.attention(
            **arguments | {"cu_seqlens": boundaries([0] * (len(values) - 1), device), "cu_seqlens_k": bad}
        )


def test_bad_gradients(device):
    arguments = list(good(device).values())
    out, lse = torch.ops.packseq.attention(*arguments)
    q, k, v, cu = arguments
    rest = (cu, None, False, -1, -1, 0, 0.0, None, None, None)
    backward = torch.ops.packseq.attention_backward
    backward(out, lse, q, k, v, out, lse, *rest)
    for bad, message in (
        ((out[:5], lse, q, k, v, out, lse), r"dout must have shape \[6, 4, 8\], got \[5, 4, 8\]"),
        ((out.half(), lse, q, k, v, out, lse), "dout must be float32 like q, got float16"),
        ((out, lse[:, :1], q, k, v, out, lse), r"dlse must have shape \[6, 4\], got \[6, 1\]"),
        ((out, None, q, k, v, out, lse.double()), "lse must be float32, got float64"),
    ):
        with pytest.raises(ValueError, match=f"attention_backward: {message}"):
            backward(*bad, *rest)


@pytest.mark.gpu
def test_what_only_a_gpu_refuses():
    arguments = good("cuda")
    for bad, message in (
        ({"q": arguments["q"].cpu()}, "k must be on cpu like q, got cuda:0"),
        ({"k": arguments["k"].cpu()}, "k must be on cuda:0 like q, got cpu"),
        ({"cu_seqlens": arguments["cu_seqlens"].cpu()}, "cu_seqlens must be on cuda:0 like q, got cpu"),
        ({n: arguments[n].double() for n in "qkv"}, "q must be float16, bfloat16 or float32 on a GPU, got float64"),
        ({n: arguments[n][..., :12] for n in "qk"}, "q must have a head dim that is a multiple of 8 .*, got 12"),
        ({"v": arguments["v"][..., :1].expand(-1, -1, 264)}, "v must have a head dim .* up to 256 .*, got 264"),
    ):
        with pytest.raises(ValueError, match=f"attention: {message}"):
            packseq.attention(**arguments | bad)
