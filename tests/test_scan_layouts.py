"""packseq.selective_scan and packseq.causal_conv1d on strided, expanded and conjugated tensors; half parameters."""

import packseq
import pytest
import torch
from compare import assert_same_bits
from operators import boundaries
from scan_cases import EVERYTHING, ConvCase, ScanCase
from scan_inputs import conv_inputs, scan_inputs
from tensors import LAYOUTS, laid_out, real, with_gradients

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_change_nothing(device, layout, is_complex, dtype):
    for operator, inputs, case in (
        ("selective_scan", scan_inputs, ScanCase("strided", (40, 0, 9), 5, dtype, 6, 3, is_complex, **EVERYTHING)),
        ("causal_conv1d", conv_inputs, ConvCase("strided", (40, 0, 9), 3, dtype, 6, True, True, True)),
    ):
        tensors, gradients, options = inputs(case, device)
        cu = boundaries(case.lengths, device)

        def call(operator=operator, cu=cu, options=options, **x):
            return getattr(packseq, operator)(**x, cu_seqlens=cu, **options, return_final_states=True)

        expected = with_gradients(call, tensors, gradients)
        got = with_gradients(call, laid_out(tensors, layout), laid_out(gradients, layout))
        for name in expected:
            assert_same_bits(name, real(got[name]), real(expected[name]))


def test_expanded_gradients_and_tensors(device):
    case = ScanCase("expanded", (7, 5), 4, F32, 6, 2, **EVERYTHING)
    tensors, gradients, options = scan_inputs(case, device)
    tensors["A"] = tensors["A"][:1].expand(6, 4)
    tensors["B"] = tensors["B"][:1].expand(12, 2, 4)
    tensors["D"] = tensors["D"][:1].expand(6)
    tensors["u"] = tensors["u"][:, :1].expand(12, 6)
    tensors["z"] = tensors["z"][:1].expand(12, 6)
    cu = boundaries(case.lengths, device)

    def call(**x):
        return packseq.selective_scan(**x, cu_seqlens=cu, **options, return_final_states=True)

    for dout in (torch.ones((), device=device), gradients["out"][:1], gradients["out"][:, :1]):
        wide = {"out": dout.expand(12, 6), "final_states": gradients["final_states"][:1].expand(2, 6, 4)}
        expanded = with_gradients(call, tensors, wide)
        dense = with_gradients(
            call, *({name: x.contiguous() for name, x in group.items()} for group in (tensors, wide))
        )
        for name in dense:
            assert_same_bits(name, expanded[name], dense[name])


def test_conjugated_views(device):
    tensors, _, _ = scan_inputs(ScanCase("conjugate", (9,), 4, F32, complex=True, initial_states=True), device)
    names = ("A", "B", "C", "initial_states")
    views = {name: x.conj() if name in names else x for name, x in tensors.items()}
    assert views["B"].is_conj()
    resolved = {name: x.resolve_conj() for name, x in views.items()}
    assert_same_bits("out", packseq.selective_scan(**views), packseq.selective_scan(**resolved))


def test_halves_of_a_projection_are_read_in_place(device):
    x, z = torch.randn(50, 64, device=device).chunk(2, 1)
    dt, B, C = torch.randn(50, 32 + 2 * 8, device=device).split([32, 8, 8], 1)
    A, weight = -torch.rand(32, 8, device=device), torch.randn(32, 4, device=device)
    cu = boundaries([20, 30], device)
    with torch.profiler.profile() as profile:
        packseq.causal_conv1d(x, weight, cu_seqlens=cu)
        packseq.selective_scan(x, dt, A, B[:, None], C[:, None], cu, z=z, delta_softplus=True)
    called = {event.key for event in profile.key_averages()}
    assert "packseq::selective_scan" in called
    assert not called & {"aten::clone", "aten::copy_"}


def test_half_parameters_of_a_convolution(device):
    x, weight, bias = torch.randn(9, 6), torch.randn(6, 4), torch.randn(6)
    x, weight, bias = (t.to(device, BF16).requires_grad_() for t in (x, weight, bias))
    out = packseq.causal_conv1d(x, weight, bias)
    assert_same_bits("out", out, packseq.causal_conv1d(x, weight.float(), bias.float()))
    grads = torch.autograd.grad(out.float().square().sum(), (weight, bias))
    assert [g.dtype for g in grads] == [BF16, BF16]
    pool = torch.zeros(9, 6, 3, dtype=BF16, device=device)
    with torch.no_grad():
        packseq.causal_conv1d_step(pool, x, weight, bias)
    assert_same_bits("newest", pool[..., -1], x.detach())
