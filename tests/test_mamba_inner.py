"""packseq.scan.mamba_inner: equal to what it is made of, with gradients, and what it keeps of every token. It has a
file of its own as torch's products are in it, whose bits depend on how many rows there are."""

from collections.abc import Callable
from itertools import pairwise

import packseq
import pytest
import torch
from bad_input import assert_raises, zeros
from compare import assert_same_bits
from operators import boundaries, statistics
from packseq.scan import mamba_inner
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
narrow_and_wide = pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda t: str(t).removeprefix("torch."))
CHANNELS, STATES, RANK, FEATURES = 24, 8, 3, 10
LENGTHS = (40, 0, 1, 25)


def composition(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, out_proj_weight, A, D, dt_bias, cu_seqlens, **options
) -> Tensor:
    reverse = options.get("reverse", False)
    x, z = xz.chunk(2, 1)
    u = packseq.causal_conv1d(x, conv_weight, conv_bias, cu_seqlens, activation="silu", reverse=reverse)
    dt, B, C = linear(u, x_proj_weight).split([dt_proj_weight.shape[1], A.shape[1], A.shape[1]], 1)
    y = packseq.selective_scan(
        *(u, linear(dt, dt_proj_weight), A, B[:, None], C[:, None], cu_seqlens),
        **{"D": D, "z": z, "delta_bias": dt_bias, "delta_softplus": True, "reverse": reverse},
    )
    return linear(y, out_proj_weight, options.get("out_proj_bias"))


def inputs(dtype: torch.dtype = F32, device: str = "cpu", total: int = sum(LENGTHS), channels: int = CHANNELS) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=F64) * scale
        return x.to(device, dtype).requires_grad_()

    parameter = statistics(dtype)
    with torch.no_grad():
        A = -draw(channels, STATES, dtype=parameter).exp()
    return {
        "xz": draw(total, 2 * channels),
        "conv_weight": draw(channels, 4, dtype=parameter),
        "conv_bias": draw(channels, dtype=parameter),
        "x_proj_weight": draw(RANK + 2 * STATES, channels, scale=channels**-0.5),
        "dt_proj_weight": draw(channels, RANK, scale=RANK**-0.5),
        "out_proj_weight": draw(FEATURES, channels, scale=channels**-0.5),
        "A": A.requires_grad_(),
        "D": draw(channels, dtype=parameter),
        "dt_bias": draw(channels, dtype=parameter),
    }


def gradient_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)


def results(function: Callable, arguments: dict, dout: Tensor | None = None, **options) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    bias = options.get("out_proj_bias")
    if bias is not None:
        options["out_proj_bias"] = leaves["out_proj_bias"] = bias.detach().requires_grad_()
    given = {name: x for name, x in leaves.items() if name != "out_proj_bias"}
    out = function(**given, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), gradient_of(out) if dout is None else dout)
    return {"out": out.detach()} | {"d" + name: grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, F64], ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_it_is_what_it_is_made_of(device, dtype, reverse, bias):
    if dtype == F64 and device == "cuda":
        pytest.skip("GPUs take no float64")
    arguments = inputs(dtype, device)
    options = {"cu_seqlens": boundaries(LENGTHS, device), "reverse": reverse}
    if bias:
        options["out_proj_bias"] = torch.linspace(-1, 1, FEATURES, device=device).to(dtype)
    got, expected = (results(f, arguments, **options) for f in (mamba_inner, composition))
    assert_same_bits("out", got["out"], expected["out"])
    ulps = 8 if dtype.itemsize == 2 else 64
    for name, x in expected.items():
        limit = ulps * torch.finfo(dtype).eps * x.abs().max().item()
        assert got[name].dtype == x.dtype
        torch.testing.assert_close(got[name], x, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}")


def test_without_what_is_optional(device):
    arguments = inputs(F32, device)
    absent = {"conv_bias": None, "D": None, "dt_bias": None}
    some = {name: x for name, x in arguments.items() if name not in absent}
    got, expected = (
        results(lambda f=f, **x: f(**x, **absent, cu_seqlens=None), some) for f in (mamba_inner, composition)
    )
    assert_same_bits("out", got["out"], expected["out"])
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-4)


def test_gradients_by_finite_differences():
    arguments = inputs(F64, channels=4, total=7)
    bias = torch.randn(FEATURES, dtype=F64, requires_grad=True)
    cu = boundaries([4, 0, 2])

    def function(bias, *leaves):
        return mamba_inner(*leaves, cu, out_proj_bias=bias)

    assert torch.autograd.gradcheck(function, [bias, *arguments.values()], fast_mode=True)


def test_a_second_derivative_raises(device):
    arguments = inputs(F32, device)
    out = mamba_inner(**arguments, cu_seqlens=boundaries(LENGTHS, device))
    [first] = torch.autograd.grad(out.square().sum(), arguments["xz"], create_graph=True)
    with pytest.raises(NotImplementedError, match="mamba_inner: second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_kept_of_every_token(device, dtype):
    """No more than mamba-ssm's fused block keeps where it computes the convolution and delta again: xz, x_dbl and the
    output of the scan (and B and C apart)."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    per_token = {}
    for total in (100, 300):
        kept.clear()
        arguments = inputs(dtype, device, total)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            mamba_inner(**arguments)
        per_token[total] = sum(kept.values())
    grown = (per_token[300] - per_token[100]) / 200
    assert grown == dtype.itemsize * (3 * CHANNELS + RANK + 2 * STATES)


@narrow_and_wide
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_sequences_never_meet(device, dtype, poison):
    arguments = inputs(dtype, device)
    cu = boundaries(LENGTHS, device)
    clean = results(mamba_inner, arguments, cu_seqlens=cu)
    dout = gradient_of(clean["out"])
    for begin, end in pairwise(cu.tolist()):
        sick, sick_dout = arguments["xz"].detach().clone(), dout.clone()
        sick[begin:end] = sick_dout[begin:end] = poison
        poisoned = results(mamba_inner, arguments | {"xz": sick}, sick_dout, cu_seqlens=cu)
        for name in ("out", "dxz"):
            for rows in (slice(0, begin), slice(end, None)):
                assert_same_bits(name, poisoned[name][rows], clean[name][rows])
            assert not poisoned[name][begin:end].isfinite().any(), name


@narrow_and_wide
def test_slack_rows(device, dtype):
    used, slack = sum(LENGTHS), 14
    arguments = inputs(dtype, device)
    options = {
        "cu_seqlens": boundaries(LENGTHS, device),
        "out_proj_bias": torch.ones(FEATURES, device=device).to(dtype),
    }
    expected = results(mamba_inner, arguments, **options)

    def with_slack(x: Tensor) -> Tensor:
        return torch.cat([x.detach(), torch.full_like(x[:slack], torch.nan)])

    longer = arguments | {"xz": with_slack(arguments["xz"])}
    got = results(mamba_inner, longer, with_slack(gradient_of(expected["out"])), **options)
    for name, x in expected.items():
        if name in ("out", "dxz"):
            assert (got[name][used:] == 0).all(), name
            got[name] = got[name][:used]
        limit = (8 if dtype == BF16 else 64) * torch.finfo(dtype).eps * x.abs().max().item()
        torch.testing.assert_close(got[name], x, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}")


@narrow_and_wide
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
def test_empty_things_work(device, dtype, lengths):
    arguments = inputs(dtype, device, total=sum(lengths))
    got = results(mamba_inner, arguments, cu_seqlens=boundaries(lengths, device))
    for name, x in got.items():
        assert x.isfinite().all(), name
        assert x.dtype == (got["out"] if name == "out" else arguments[name[1:]]).dtype, name
        if sum(lengths) == 0:
            assert not x.any(), name


def test_what_is_kept_has_no_gradient(device):
    _, x_dbl, y = torch.ops.packseq.mamba_inner(*raw_arguments(F32, device))
    for x in (x_dbl, y):
        with pytest.raises(RuntimeError, match="does not require grad"):
            x.sum().backward()


def raw_arguments(dtype: torch.dtype, device: str) -> list[Tensor]:
    arguments = list(inputs(dtype, device).values())
    arguments.insert(6, torch.ones(FEATURES, dtype=dtype, device=device, requires_grad=True))
    return [*arguments, boundaries(LENGTHS, device)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(device, dtype):
    arguments = raw_arguments(dtype, device)
    torch.library.opcheck(torch.ops.packseq.mamba_inner, arguments)
    detached = [x.detach() for x in arguments]
    out, x_dbl, y = torch.ops.packseq.mamba_inner(*detached)
    torch.library.opcheck(torch.ops.packseq.mamba_inner_backward, [out, *detached, False, x_dbl, y])


def test_compiles_whole(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mamba_inner, fullgraph=True, backend=counter)
    for lengths in ([5, 3, 8], [4, 0, 2, 9], [6, 20], [31, 2, 2, 2, 2, 17, 90]):
        arguments = inputs(F32, device, total=sum(lengths))
        options = {"cu_seqlens": boundaries(lengths, device)}
        got, expected = (results(f, arguments, **options) for f in (compiled, mamba_inner))
        for name, x in expected.items():
            assert_same_bits(name, got[name], x)
    assert counter.frame_count <= 2, "recompiled more than once"


def test_autocast(device):
    arguments = inputs(F32, device)
    cu = boundaries(LENGTHS, device)
    narrow = {n: x.to(BF16) if n == "xz" or "proj" in n else x for n, x in arguments.items()}
    expected = mamba_inner(**narrow, cu_seqlens=cu)
    with torch.autocast(device, dtype=BF16):
        out = mamba_inner(**arguments, cu_seqlens=cu)
        assert_same_bits("out", out, expected)
        grads = torch.autograd.grad(out.float().square().sum(), list(arguments.values()))  # not cast again
    expected = torch.autograd.grad(expected.float().square().sum(), list(narrow.values()))
    for name, grad, x in zip(arguments, grads, expected, strict=True):
        assert_same_bits(name, grad, x.float())


BAD = {
    "xz-is-odd": ({"xz": lambda x: x[:, 1:]}, r"xz must be \[total, 2 \* channels\], got shape \[66, 47\]"),
    "xz-is-flat": ({"xz": lambda x: x.flatten()}, r"xz must be \[total, 2 \* channels\], got shape"),
    "xz-is-int": ({"xz": lambda x: x.int()}, "xz must be float16, bfloat16, float32 or float64, got int32"),
    "conv-weight": ({"conv_weight": lambda x: x[0]}, r"conv_weight must be \[channels, width\], got shape \[4\]"),
    "x-proj-shape": ({"x_proj_weight": lambda x: x[1:]}, r"x_proj_weight must have shape \[19, 24\], got \[18, 24\]"),
    "x-proj-dtype": ({"x_proj_weight": lambda x: x.half()}, "x_proj_weight must be float32 like xz, got float16"),
    "dt-proj-flat": (
        {"dt_proj_weight": lambda x: x[0]},
        r"dt_proj_weight must be \[channels, dt_rank\], got shape \[3\]",
    ),
    "dt-proj-shape": ({"dt_proj_weight": lambda x: x[1:]}, r"dt_proj_weight must have shape \[24, 3\], got \[23, 3\]"),
    "out-proj": (
        {"out_proj_weight": lambda x: x[:, 1:]},
        r"out_proj_weight must have shape \[10, 24\], got \[10, 23\]",
    ),
    "out-bias": ({"out_proj_bias": zeros(9)}, r"out_proj_bias must have shape \[10\], got \[9\]"),
    "A-is-complex": ({"A": lambda x: x.cfloat()}, "A must be real, got complex64"),
    "A-is-flat": ({"A": lambda x: x[0]}, r"A must be \[channels, states\], got shape \[8\]"),
    "conv-channels": ({"conv_weight": lambda x: x[1:]}, r"conv_weight must have shape \[24, 4\], got \[23, 4\]"),
    "conv-bias": ({"conv_bias": lambda x: x[1:]}, r"conv_bias must have shape \[24\], got \[23\]"),
    "conv-bias-dtype": ({"conv_bias": lambda x: x.double()}, "conv_bias must be float32, got float64"),
    "A-channels": ({"A": lambda x: x[1:]}, r"A must have shape \[24, 8\], got \[23, 8\]"),
    "A-is-double": ({"A": lambda x: x.double()}, "A must be float32, got float64"),
    "D": ({"D": lambda x: x[1:]}, r"D must have shape \[24\], got \[23\]"),
    "D-dtype": ({"D": lambda x: x.double()}, "D must be float32, got float64"),
    "dt-bias": ({"dt_bias": lambda x: x[1:]}, r"dt_bias must have shape \[24\], got \[23\]"),
    "dt-bias-dtype": ({"dt_bias": lambda x: x.double()}, "dt_bias must be float32, got float64"),
}
# What the operators within find, by their own names.
BAD_WITHIN = {
    "conv-width": (
        {"conv_weight": lambda x: x[:, :1]},
        "causal_conv1d: weight must have a width between 2 and 8, got 1",
    ),
    "cu-is-long": ({"cu_seqlens": lambda x: x.long()}, "causal_conv1d: cu_seqlens must be int32, got int64"),
    "cu-values": ({"cu_seqlens": lambda x: x + 1}, "causal_conv1d: cu_seqlens must start at 0, got 1"),
}


def good(device: str) -> dict[str, Tensor]:
    return {n: x.detach() for n, x in inputs(F32, device).items()} | {"cu_seqlens": boundaries(LENGTHS, device)}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(device, name):
    changes, message = BAD[name]
    assert_raises(mamba_inner, good(device), changes, f"mamba_inner: {message}")


@pytest.mark.parametrize("name", BAD_WITHIN)
def test_bad_input_of_the_operators_within(device, name, monkeypatch):
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")  # the CPU needs no asking
    assert_raises(mamba_inner, good(device), *BAD_WITHIN[name])
