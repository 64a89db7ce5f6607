"""The inside of a Mamba block as one operator, made of others: what it computes, what it keeps, its gradients."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._boundaries import slack_rows
from ._registration import empty_gradient, register_autocast, register_gradient, register_python_kernel, wide_dtype

# The products within must not be cast again, and their backward may run under autocast too.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _check(operator: str, xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, dt_bias) -> None:
    """What the operators within would call by other names; these check the rest."""

    def check(holds: bool, name: str, expected: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{operator}: {name} must {expected}, got {got}")

    def check_like_xz(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        check_one(name, x, shape, xz.dtype, f"{_name(xz.dtype)} like xz")

    def check_parameter(name: str, x: Tensor | None, *shape: int) -> None:
        wide = wide_dtype(xz.dtype)
        if x is not None:
            check_one(name, x, shape, wide, _name(wide))

    def check_one(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, expected: str) -> None:
        check(tuple(x.shape) == shape, name, f"have shape {list(shape)}", list(x.shape))
        check(x.dtype == dtype, name, f"be {expected}", _name(x.dtype))
        check(x.device == xz.device, name, f"be on {xz.device} like xz", x.device)

    two_rows = xz.dim() == 2 and xz.shape[1] >= 2 and xz.shape[1] % 2 == 0
    check(two_rows, "xz", "be [total, 2 * channels]", f"shape {list(xz.shape)}")
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    check(xz.dtype in floats, "xz", "be float16, bfloat16, float32 or float64", _name(xz.dtype))
    channels = xz.shape[1] // 2
    check(conv_weight.dim() == 2, "conv_weight", "be [channels, width]", f"shape {list(conv_weight.shape)}")
    check(A.dim() == 2, "A", "be [channels, states]", f"shape {list(A.shape)}")
    check(A.is_floating_point(), "A", "be real", _name(A.dtype))
    check_parameter("conv_weight", conv_weight, channels, conv_weight.shape[1])
    check_parameter("conv_bias", conv_bias, channels)
    check_parameter("A", A, channels, A.shape[1])
    check_parameter("D", D, channels)
    check_parameter("dt_bias", dt_bias, channels)
    check(dt_proj.dim() == 2, "dt_proj_weight", "be [channels, dt_rank]", f"shape {list(dt_proj.shape)}")
    check_like_xz("dt_proj_weight", dt_proj, (channels, dt_proj.shape[1]))
    check_like_xz("x_proj_weight", x_proj, (dt_proj.shape[1] + 2 * A.shape[1], channels))
    check(out_proj.dim() == 2, "out_proj_weight", "be [features, channels]", f"shape {list(out_proj.shape)}")
    check_like_xz("out_proj_weight", out_proj, (out_proj.shape[0], channels))
    if out_bias is not None:
        check_like_xz("out_proj_bias", out_bias, (out_proj.shape[0],))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _convolved(x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, cu_seqlens: Tensor, reverse: bool) -> Tensor:
    return torch.ops.packseq.causal_conv1d(x, conv_weight, cu_seqlens, conv_bias, None, True, reverse)[0]


def _scan_inputs(x_dbl: Tensor, dt_proj: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt, delta, B and C; zeros in the slack, as the convolution left."""
    dt, B, C = x_dbl.split([dt_proj.shape[1], A.shape[1], A.shape[1]], 1)
    return dt, linear(dt, dt_proj), B[:, None], C[:, None]


def _forward(
    xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, dt_bias, cu_seqlens, reverse=False
) -> tuple[Tensor, Tensor, Tensor]:
    _check("mamba_inner", xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, dt_bias)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        x, z = xz.chunk(2, 1)
        u = _convolved(x, conv_weight, conv_bias, cu_seqlens, reverse)
        x_dbl = linear(u, x_proj)
        _, delta, B, C = _scan_inputs(x_dbl, dt_proj, A)
        y = torch.ops.packseq.selective_scan(u, delta, A, B, C, cu_seqlens, D, z, dt_bias, None, True, reverse)[0]
        out = linear(y, out_proj, out_bias)
        if out_bias is not None:
            out.masked_fill_(slack_rows(cu_seqlens, len(out))[:, None], 0)
        return out, x_dbl, y


def _backward(
    dout, xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, dt_bias, cu_seqlens, reverse, x_dbl, y
) -> tuple[Tensor, ...]:
    _check("mamba_inner_backward", xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, dt_bias)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        dout = dout.masked_fill(
            slack_rows(cu_seqlens, len(dout))[:, None], 0
        )  # sums over rows must not meet what is there
        dout_proj, dy = dout.t() @ y, dout @ out_proj
        x, z = xz.chunk(2, 1)
        u = _convolved(x, conv_weight, conv_bias, cu_seqlens, reverse)
        dt, delta, B, C = _scan_inputs(x_dbl, dt_proj, A)
        du, ddelta, dA, dB, dC, dD, dz, ddt_bias, _ = torch.ops.packseq.selective_scan_backward(
            dy, None, u, delta, A, B, C, cu_seqlens, D, z, dt_bias, None, True, reverse
        )
        del delta, dy
        ddt_proj = ddelta.t() @ dt
        dx_dbl = torch.cat([ddelta @ dt_proj, dB.flatten(1), dC.flatten(1)], 1)
        del ddelta
        dx_proj = dx_dbl.t() @ u
        du.addmm_(dx_dbl, x_proj)
        dx, dconv_weight, dconv_bias, _ = torch.ops.packseq.causal_conv1d_backward(
            du, None, x, conv_weight, cu_seqlens, conv_bias, None, True, reverse
        )
        dout_bias = dout.new_empty(0) if out_bias is None else dout.sum(0)
        dxz = torch.cat([dx, dz], 1)
        return dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, dout_proj, dout_bias, dA, dD, ddt_bias


register_python_kernel("mamba_inner", _forward)
register_python_kernel("mamba_inner_backward", _backward)


@torch.library.register_fake("packseq::mamba_inner")
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, *rest):
    total, channels = xz.shape[0], xz.shape[1] // 2
    return tuple(xz.new_empty(total, width) for width in (out_proj.shape[0], x_proj.shape[0], channels))


@torch.library.register_fake("packseq::mamba_inner_backward")
def _(dout, xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, dt_bias, *rest):
    given = {"xz": xz, "conv_weight": conv_weight, "x": x_proj, "dt": dt_proj, "out": out_proj, "A": A}
    dxz, dconv_weight, dx_proj, ddt_proj, dout_proj, dA = (x.new_empty(x.shape) for x in given.values())
    dconv_bias, dout_bias = empty_gradient(conv_bias, like=conv_weight), empty_gradient(out_bias, like=dout)
    dD, ddt_bias = empty_gradient(D, like=xz), empty_gradient(dt_bias, like=xz)
    return dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, dout_proj, dout_bias, dA, dD, ddt_bias


def _save(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, dout, *_):
    if dout is None:
        return (None,) * 12
    *tensors, x_dbl, y = ctx.saved_tensors
    grads = torch.ops.packseq.mamba_inner_backward(dout, *tensors, ctx.reverse, x_dbl, y)
    optional = (None if x is None else grad for x, grad in zip(tensors, grads, strict=False))
    return *optional, None, None


def _cast(cast, xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, *rest):
    return cast(xz), conv_weight, conv_bias, cast(x_proj), cast(dt_proj), cast(out_proj), cast(out_bias), *rest


register_gradient("mamba_inner", _gradients, _save)
register_autocast("mamba_inner", _cast)
