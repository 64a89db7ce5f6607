"""packseq.selective_scan_step and packseq.causal_conv1d_step: equal to the scan and the convolution; pools of states,
packseq.s4_step's too; and what all of them do in CUDA graphs."""

from collections.abc import Callable
from functools import partial

import packseq
import pytest
import torch
from compare import assert_same_bits
from longconv_cases import FilterCase
from longconv_inputs import s4_parameters
from operators import boundaries, captured
from scan_cases import EVERYTHING, MAMBA, ConvCase, ScanCase
from scan_inputs import conv_inputs, scan_inputs
from tensors import Draw, Tensors, real
from torch import Tensor

F32, BF16, F64, C64 = torch.float32, torch.bfloat16, torch.float64, torch.complex64


def pool_and_indices(n: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Slots in no order, more than are used."""
    generator = torch.Generator().manual_seed(n)
    pool = torch.randn(n + 5, *shape, generator=generator, dtype=F64.to_complex() if dtype.is_complex else F64)
    return pool.to(device, dtype), torch.randperm(n + 5, generator=generator)[:n].int().to(device)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(1,) * 7, (3, 1, 0, 5, 1), (0,), ()], ids=str)
def test_scan_steps_are_the_scan(device, lengths, dtype, is_complex):
    case = ScanCase("step", lengths, 16, dtype, 12, 3, is_complex, **MAMBA)
    tensors, _, _ = scan_inputs(case, device)
    pool, indices = pool_and_indices(len(lengths), (12, 16), tensors["A"].dtype, device)
    options = {"cu_seqlens": boundaries(lengths, device), "delta_softplus": True}
    before = pool.clone()
    out = packseq.selective_scan_step(pool, **tensors, **options, indices=indices)
    expected, states = packseq.selective_scan(
        **tensors, **options, initial_states=before[indices.long()], return_final_states=True
    )
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps * 8, atol=torch.finfo(dtype).eps * 8)
    torch.testing.assert_close(pool[indices.long()], states, rtol=1e-5, atol=1e-5)
    others = torch.ones(len(pool), dtype=torch.bool).scatter(0, indices.long().cpu(), False).to(device)
    assert_same_bits("slots that are nobody's", pool[others], before[others])


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("lengths", [(1,) * 7, (3, 1, 0, 9, 1), (0,), ()], ids=str)
def test_convolution_steps_are_the_convolution(device, lengths, width, dtype):
    tensors, _, _ = conv_inputs(ConvCase("step", lengths, width, dtype, 12, bias=True), device)
    pool, indices = pool_and_indices(len(lengths), (12, width - 1), dtype, device)
    options = {"cu_seqlens": boundaries(lengths, device), "activation": "silu"}
    before = pool.clone()
    out = packseq.causal_conv1d_step(pool, **tensors, **options, indices=indices)
    expected, states = packseq.causal_conv1d(
        **tensors, **options, initial_states=before[indices.long()], return_final_states=True
    )
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps * 4, atol=torch.finfo(dtype).eps * 4)
    assert_same_bits("states", pool[indices.long()], states)
    others = torch.ones(len(pool), dtype=torch.bool).scatter(0, indices.long().cpu(), False).to(device)
    assert_same_bits("slots that are nobody's", pool[others], before[others])


def test_a_sequence_decoded_token_by_token(device):
    tensors, _, _ = scan_inputs(ScanCase("decode", (40,), 16, F32, 12, **MAMBA), device)
    expected, [state] = packseq.selective_scan(**tensors, delta_softplus=True, return_final_states=True)
    pool = torch.zeros(1, 12, 16, device=device)
    per_token = ("u", "delta", "B", "C", "z")
    outs = [
        packseq.selective_scan_step(
            pool, **{n: x[t : t + 1] if n in per_token else x for n, x in tensors.items()}, delta_softplus=True
        )
        for t in range(40)
    ]
    torch.testing.assert_close(torch.cat(outs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[0], state, rtol=1e-5, atol=1e-5)


def step_calls(device: str, n: int = 4) -> list[tuple[Callable, Tensor, Tensors]]:
    """Each step operator with n tokens of n sequences: a call with a pool (and indices), the pool, its rows by name."""
    scan, _, _ = scan_inputs(ScanCase("calls", (1,) * n, 4, F32, 6, **MAMBA), device)
    conv, _, _ = conv_inputs(ConvCase("calls", (1,) * n, 4, F32, 6, bias=True), device)
    draw = Draw(FilterCase("calls", 4, n), device)
    s4 = {"u": draw(n, 6, dtype=F32), **s4_parameters(draw, 6, 4, 1, C64)}

    def scan_step(pool, **options):
        return packseq.selective_scan_step(pool, **scan | options, delta_softplus=True)

    def conv_step(pool, **options):
        return packseq.causal_conv1d_step(pool, **conv | options)

    def s4_step(pool, **options):
        return packseq.s4_step(pool, **s4 | options)

    return [
        (scan_step, draw(n + 2, 6, 4, dtype=F32), {"u": scan["u"]}),
        (conv_step, draw(n + 2, 6, 3, dtype=F32), {"x": conv["x"]}),
        (s4_step, draw(n + 2, 6, 4, dtype=C64), {"u": s4["u"]}),
    ]


def test_negative_indices_skip(device):
    for step, pool, _ in step_calls(device):
        before, whole = pool.clone(), pool.clone()
        expected = step(whole, indices=torch.tensor([3, 5, 1, 0], dtype=torch.int32, device=device))
        out = step(pool, indices=torch.tensor([3, -1, 1, -(2**31)], dtype=torch.int32, device=device))
        for i, slot in ((0, 3), (2, 1)):
            assert_same_bits("out", out[i], expected[i])
            assert_same_bits("state", real(pool[slot]), real(whole[slot]))
        assert_same_bits("skipped", out[[1, 3]], torch.zeros_like(out[[1, 3]]))
        assert_same_bits("untouched", real(pool[[0, 2, 4, 5]]), real(before[[0, 2, 4, 5]]))
        everyone = step(pool, indices=torch.full((4,), -1, dtype=torch.int32, device=device))
        assert (everyone == 0).all()


def test_without_indices_sequence_i_has_slot_i(device):
    for step, pool, _ in step_calls(device):
        named = pool.clone()
        expected = step(named, indices=torch.arange(4, dtype=torch.int32, device=device))
        assert_same_bits("out", step(pool), expected)
        assert_same_bits("pool", real(pool), real(named))


def test_a_step_is_seen_by_autograd(device):
    for step, pool, rows in step_calls(device):
        scale = torch.ones((), device=device, requires_grad=True)
        loss = real(scale * pool).sum()  # saves the pool
        step(pool)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        needs = {name: x.clone().requires_grad_() for name, x in rows.items()}
        with pytest.raises(NotImplementedError, match=r"there is no gradient, [ux] must not require one"):
            step(pool, **needs)
        with pytest.raises(NotImplementedError, match="there is no gradient, states must not require one"):
            step(pool.requires_grad_())
        with torch.no_grad():
            assert not step(pool, **needs).requires_grad
        with torch.inference_mode():
            step(pool.detach().clone(), **needs)


# ---- CUDA graphs, where no boundaries are given


@pytest.mark.gpu
def test_one_sequence_in_a_graph():
    for operator, inputs, case in (
        ("selective_scan", scan_inputs, ScanCase("graph", (90,), 3, F32, **EVERYTHING)),
        ("causal_conv1d", conv_inputs, ConvCase("graph", (90,), 3, F32, silu=True)),
    ):
        tensors, _, options = inputs(case, "cuda")
        call = partial(getattr(packseq, operator), **tensors, **options)
        graph, out = captured(call)
        rows = next(iter(tensors.values()))
        rows.mul_(0.5)
        graph.replay()
        assert_same_bits("out", out.clone(), call())


@pytest.mark.gpu
def test_a_captured_step_replays_with_other_indices():
    for step, pool, _ in step_calls("cuda"):
        before, indices = pool.clone(), torch.arange(4, dtype=torch.int32, device="cuda")
        graph, out = captured(partial(step, pool, indices=indices))
        for values in ([3, 5, 1, 0], [-1, 2, -7, 4], [-1] * 4):
            pool.copy_(before)
            indices.copy_(torch.tensor(values))
            graph.replay()
            expected = before.clone()
            assert_same_bits("out", out.clone(), step(expected, indices=indices))
            assert_same_bits("pool", real(pool), real(expected))
