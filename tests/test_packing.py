"""packseq.pack, packseq.unpack and the helpers of packseq.packing, against plain indexing."""

import packseq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import captured
from packseq import packing
from torch import Tensor

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]
ROWS = [(), (1,), (3,), (64,), (5, 7), (2, 0), (20000,)]
LONG, INT = torch.int64, torch.int32


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    x = torch.randint(1, 100, shape, generator=generator)
    return (x % 2 == 1 if dtype == torch.bool else x.to(torch.float32).to(dtype)).to(device)


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 37, 1, 100, 63, 64, 65])
    places = torch.arange(100)
    right = places < lengths[:, None]
    return {
        "right": right,
        "left": right.flip(1),
        "both ends": right & right.flip(1).roll(1, 0),
        "holes": torch.rand(7, 100, generator=generator) < 0.6,
        "few": torch.rand(50, 300, generator=generator) < 0.01,
        "all": torch.ones(3, 5, dtype=torch.bool),
        "none": torch.zeros(3, 5, dtype=torch.bool),
        "one long": torch.rand(1, 50000, generator=generator) < 0.5,
        "many short": torch.rand(5000, 3, generator=generator) < 0.5,
        "no sequences": torch.ones(0, 5, dtype=torch.bool),
        "no rows": torch.ones(5, 0, dtype=torch.bool),
    }


MASKS = masks()


def by_definition(padded: Tensor, mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    slack = capacity - int(mask.sum())
    tokens = torch.cat([padded[mask], padded.new_zeros(slack, *padded.shape[2:])])
    boundaries = torch.cat([torch.zeros(1, dtype=LONG), mask.cpu().sum(1).cumsum(0)]).int()
    indices = torch.cat([mask.reshape(-1).nonzero()[:, 0], torch.full((slack,), -1, device=mask.device)])
    return tokens, boundaries.to(mask.device), indices


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        assert x.equal(y)


def comparable(x: Tensor) -> Tensor:
    """torch itself can do little with eight-bit floats."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def check(padded: Tensor, mask: Tensor, capacity: int | None = None) -> None:
    tokens, cu_seqlens, indices = packseq.pack(padded, mask, capacity=capacity)
    back = packseq.unpack(tokens, indices, *mask.shape)
    assert tokens.dtype == back.dtype == padded.dtype
    tokens, back, padded = comparable(tokens), comparable(back), comparable(padded)
    expected = by_definition(padded, mask, mask.numel() if capacity is None else capacity)
    assert_same((tokens, cu_seqlens, indices), expected)
    zeros = torch.zeros_like(padded)
    zeros[mask] = padded[mask]
    assert_same((back,), (zeros,))


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, device):
    mask = MASKS[name].to(device)
    padded = random(*mask.shape, 6, device=device)
    for capacity in (None, int(mask.sum()), mask.numel() + 7):
        check(padded, mask, capacity)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_dtypes_and_rows(dtype, row, device):
    mask = MASKS["holes"][:4, :30].to(device)
    check(random(*mask.shape, *row, dtype=dtype, device=device), mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_masks_of_integers(dtype, device):
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 4, device=device)
    high = 1 if dtype == torch.bool else torch.iinfo(dtype).min // 2  # low bytes are zero: every byte counts
    integers = mask.to(dtype) if dtype == torch.bool else torch.where(mask, high, 0).to(dtype)
    if dtype == torch.uint8:
        integers = mask.to(dtype) * 128
    assert_same(packseq.pack(padded, integers), packseq.pack(padded, mask))


@pytest.mark.parametrize("dtype", [INT, LONG], ids=str)
def test_lengths(dtype, device):
    mask = MASKS["right"].to(device)
    padded = random(*mask.shape, 4, device=device)
    lengths = mask.sum(1).to(dtype)
    assert_same(packseq.pack(padded, lengths=lengths), packseq.pack(padded, mask))


def test_exact_capacity(device):
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 4, device=device)
    assert_same(packseq.pack(padded, mask, capacity="exact"), by_definition(padded, mask, int(mask.sum())))
    lengths = MASKS["right"].sum(1).to(device)
    tokens, cu_seqlens, _ = packseq.pack(padded, lengths=lengths, capacity="exact")
    assert tokens.shape[0] == int(cu_seqlens[-1]) == int(lengths.sum())


def test_unpack_by_boundaries(device):
    mask = MASKS["right"].to(device)
    padded = random(*mask.shape, 4, device=device)
    tokens, cu_seqlens, indices = packseq.pack(padded, mask)
    by_indices = packseq.unpack(tokens, indices, *mask.shape)
    assert_same((packseq.unpack(tokens, cu_seqlens, *mask.shape),), (by_indices,))
    assert_same((packseq.unpack(tokens[: cu_seqlens[-1]], cu_seqlens, *mask.shape),), (by_indices,))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("row", [(), (3,), (64,)], ids=str)
def test_fill(dtype, row, device):
    fill = {torch.bool: True, torch.complex64: 2 - 3j, torch.complex128: 2 - 3j}.get(dtype, 77)
    fill = -(2**62) + 1 if dtype == LONG else fill  # no float64 holds it
    mask = MASKS["holes"][:4, :30].to(device)
    padded = random(*mask.shape, *row, dtype=dtype, device=device)
    tokens, _, indices = packseq.pack(padded, mask)
    right = torch.full_like(padded, fill)
    right[mask] = padded[mask]
    assert_same((packseq.unpack(tokens, indices, *mask.shape, fill=fill),), (right,))


def test_fill_with_nan_and_infinity(device):
    tokens, indices = random(2, 3, device=device), torch.tensor([0, 3], device=device)
    assert packseq.unpack(tokens, indices, 2, 2, fill=float("-inf"))[0, 1].eq(float("-inf")).all()
    assert packseq.unpack(tokens, indices, 2, 2, fill=float("nan"))[1, 0].isnan().all()


def test_strided_inputs(device):
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 12, device=device)
    wanted = packseq.pack(padded.clone(), mask.clone())
    assert_same(packseq.pack(padded.permute(2, 0, 1).contiguous().permute(1, 2, 0), mask.t().contiguous().t()), wanted)
    one_off = torch.empty(padded.numel() + 1, device=device)[1:].view(padded.shape).copy_(padded)
    assert_same(packseq.pack(one_off, mask), wanted)
    assert_same(packseq.pack(padded[..., 3:7], mask), packseq.pack(padded[..., 3:7].clone(), mask))
    tokens, _, indices = wanted
    wide = torch.stack([tokens, tokens], 1)[:, 0]
    both = torch.stack([indices, indices], 1)[:, 0]
    assert_same((packseq.unpack(wide, both, *mask.shape),), (packseq.unpack(tokens, indices, *mask.shape),))


def test_conjugated_and_negated_views(device):
    """Their memory does not hold their values."""
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 3, dtype=torch.complex64, device=device) * (1 + 2j)
    for view in (padded.conj(), padded.conj().imag):
        assert_same(packseq.pack(view, mask), packseq.pack(view.resolve_conj().resolve_neg().clone(), mask))


def test_slack_of_the_tokens_is_not_read(device):
    mask = MASKS["holes"].to(device)
    tokens, cu_seqlens, indices = packseq.pack(random(*mask.shape, 4, device=device), mask)
    clean = packseq.unpack(tokens, indices, *mask.shape)
    tokens[cu_seqlens[-1] :] = torch.nan
    assert_same((packseq.unpack(tokens, indices, *mask.shape),), (clean,))


def test_padding_is_not_read(device):
    mask = MASKS["left"].to(device)
    padded = random(*mask.shape, 4, device=device)
    clean = packseq.pack(padded, mask)
    assert_same(packseq.pack(padded.masked_fill(~mask[..., None], torch.nan), mask), clean)


# ---- gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64], ids=str)
def test_gradients_are_each_other(dtype, device):
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 3, dtype=dtype, device=device).requires_grad_()
    tokens, _, indices = packseq.pack(padded, mask)
    seed = random(*tokens.shape, dtype=dtype, device=device)
    (grad,) = torch.autograd.grad(tokens, padded, seed)
    assert_same((grad,), (packseq.unpack(seed, indices, *mask.shape),))

    tokens = tokens.detach().requires_grad_()
    again = packseq.unpack(tokens, indices, *mask.shape, fill=3)
    seed = random(*again.shape, dtype=dtype, device=device)
    (grad,) = torch.autograd.grad(again, tokens, seed)
    assert_same((grad,), (packseq.pack(seed, mask)[0],))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", ["mask", "lengths"])
def test_gradcheck(dtype, kind, device):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool, device=device)
    keep = {"mask": mask} if kind == "mask" else {"lengths": mask.sum(1)}
    padded = random(4, 3, 2, dtype=dtype, device=device).requires_grad_()

    def pack(x):
        return packseq.pack(x, **keep)[0]

    assert torch.autograd.gradcheck(pack, padded)
    assert torch.autograd.gradgradcheck(pack, padded)

    tokens, cu_seqlens, indices = packseq.pack(padded.detach(), **keep)
    for places in (indices, cu_seqlens):

        def unpack(x, places=places):
            return packseq.unpack(x, places, 4, 3, fill=2)

        assert torch.autograd.gradcheck(unpack, tokens.requires_grad_())
        assert torch.autograd.gradgradcheck(unpack, tokens.requires_grad_())


def test_second_derivative_of_something_that_bends(device):
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 3, dtype=torch.float64, device=device).requires_grad_()
    tokens, _, indices = packseq.pack(padded, mask)
    out = packseq.unpack(tokens.pow(3), indices, *mask.shape)
    (first,) = torch.autograd.grad(out.sum(), padded, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), padded)
    assert second.equal(6 * padded.detach() * mask[..., None])


def test_expanded_gradients(device):
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 3, device=device).requires_grad_()
    tokens, _, indices = packseq.pack(padded, mask)
    packseq.unpack(tokens, indices, *mask.shape).sum().backward()
    assert padded.grad.equal(mask[..., None].expand_as(padded).float())


def test_boundaries_and_indices_have_no_gradient(device):
    mask = MASKS["holes"].to(device)
    tokens, cu_seqlens, indices = packseq.pack(random(*mask.shape, device=device).requires_grad_(), mask)
    assert tokens.requires_grad
    assert not cu_seqlens.requires_grad
    assert not indices.requires_grad


# ---- as torch sees the operators


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    ops, mask = torch.ops.packseq, MASKS["right"].to(device)
    padded = random(*mask.shape, 3, device=device).requires_grad_(requires_grad)
    torch.library.opcheck(ops.pack, (padded, mask, None))
    torch.library.opcheck(ops.pack, (padded, None, mask.sum(1)), {"capacity": 500})
    tokens, cu_seqlens, indices = packseq.pack(padded.detach(), mask)
    tokens.requires_grad_(requires_grad)
    fill = torch.full((4,), 2.0, device=device)
    torch.library.opcheck(ops.unpack, (tokens, indices, *mask.shape))
    torch.library.opcheck(ops.unpack, (tokens, cu_seqlens, *mask.shape, fill))
    torch.library.opcheck(ops.unpack_backward, (padded, indices, mask.numel()))
    torch.library.opcheck(ops.unpack_backward, (padded, cu_seqlens, 400))


def round_trip(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    tokens, cu_seqlens, indices = packseq.pack(padded, mask)
    return packseq.unpack(tokens * 2, indices, *mask.shape, fill=-1), cu_seqlens


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_once_for_all_shapes(backend, device):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(round_trip, fullgraph=True, backend=counter)
    for batch, length in [(3, 10), (4, 12), (7, 33), (5, 128), (2, 9)]:
        mask = MASKS["few"][:batch, :length].to(device) | (torch.arange(length, device=device) % 3 == 0)
        padded = random(batch, length, 6, device=device).requires_grad_()
        again = padded.detach().requires_grad_()
        got, want = compiled(padded, mask), round_trip(again, mask)
        assert_same(got, want)
        got[0].pow(2).sum().backward()
        want[0].pow(2).sum().backward()
        assert_same((padded.grad,), (again.grad,))
    assert counter.frame_count <= 2


def test_autocast_changes_nothing(device):
    mask = MASKS["holes"].to(device)
    padded = random(*mask.shape, 3, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        tokens, _, indices = packseq.pack(padded, mask)
        assert packseq.unpack(tokens, indices, *mask.shape).equal(padded * mask[..., None])


def test_helpers_compile_whole(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def boundaries(position_ids, mask):
        cu_seqlens = packing.from_position_ids(position_ids, mask, max_sequences=5)
        sequence = packing.to_seq_idx(cu_seqlens, position_ids.shape[0])
        return cu_seqlens, packing.from_seq_idx(sequence, max_sequences=5)

    ids = torch.tensor([0, 1, 2, 0, 1, 0, 0], device=device)
    for x in boundaries(ids, ids >= 0):
        assert x.tolist() == [0, 3, 5, 6, 7, 7]


def test_export(device):
    class Module(torch.nn.Module):
        def forward(self, padded, mask):
            return round_trip(padded, mask)

    mask = MASKS["right"].to(device)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = {"padded": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    exported = torch.export.export(Module(), (random(*mask.shape, 4, device=device), mask), dynamic_shapes=shapes)
    mask = MASKS["few"].to(device)
    padded = random(*mask.shape, 4, device=device)
    assert_same(exported.module()(padded, mask), round_trip(padded, mask))


def test_meta():
    padded, mask = torch.empty(3, 5, 7, device="meta"), torch.empty(3, 5, dtype=torch.bool, device="meta")
    tokens, cu_seqlens, indices = packseq.pack(padded, mask)
    assert (tokens.shape, cu_seqlens.shape, indices.shape) == ((15, 7), (4,), (15,))
    assert packseq.pack(padded, mask, capacity=4)[0].shape == (4, 7)
    assert packseq.unpack(tokens, indices, 3, 5).shape == padded.shape
    assert packing.from_position_ids(torch.empty(9, dtype=LONG, device="meta"), max_sequences=4).shape == (5,)


@pytest.mark.gpu
def test_graph_replays_with_another_mask():
    mask = MASKS["right"].cuda()
    padded = random(*mask.shape, 8, device="cuda").requires_grad_()

    def step():
        tokens, cu_seqlens, indices = packseq.pack(padded, mask, capacity=500)
        out = packseq.unpack(tokens * 2, indices, *mask.shape, fill=-1)
        starts = packing.from_seq_idx(packing.to_seq_idx(cu_seqlens, 500), max_sequences=10)
        return tokens, cu_seqlens, indices, out, starts, *torch.autograd.grad(out.sum(), padded)

    graph, results = captured(step)
    for name in ("left", "holes", "both ends"):
        mask.copy_(MASKS[name])
        graph.replay()
        assert_same(tuple(x.detach() for x in results), tuple(x.detach() for x in step()))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    mask = MASKS["holes"].cuda()
    padded = random(*mask.shape, 8, device="cuda").requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens, cu_seqlens, indices = packseq.pack(padded, mask)
        packseq.pack(padded, lengths=mask.sum(1))
        packseq.unpack(tokens, indices, *mask.shape, fill=1).sum().backward()
        packing.from_position_ids(packing.to_position_ids(cu_seqlens, 700), max_sequences=9)
        packing.from_seq_idx(packing.to_seq_idx(cu_seqlens, 700))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.big
def test_beyond_2_to_31_elements():
    """Many sequences: it is the last one's offset that overflows first."""
    batch, length, row = 1100, 1024, 2048
    padded = torch.zeros(batch, length, row, dtype=torch.int8, device="cuda")
    padded += torch.arange(batch * length, device="cuda").view(batch, length, 1).remainder(97).to(torch.int8)
    mask = torch.arange(length, device="cuda") >= torch.arange(batch, device="cuda")[:, None] % 30
    tokens, _, indices = packseq.pack(padded, mask)
    total = int(mask.sum())
    assert total * row > 2**31
    assert tokens[:total, ::1000].long().equal((indices[:total, None] % 97).expand(-1, 3))
    assert not tokens[total:].any()
    again = packseq.unpack(tokens, indices, batch, length)
    assert again.equal(padded.mul_(mask[..., None]))


# ---- bad input


def packable() -> dict:
    return {"padded": torch.zeros(3, 4, 2), "mask": torch.ones(3, 4, dtype=torch.bool), "lengths": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padded": torch.zeros(3)}, r"pack: padded must be \[batch, length, ...\], got shape \[3\]"),
        ({"mask": None}, "pack: one of mask and lengths must be given, got none"),
        ({"lengths": torch.ones(3, dtype=INT)}, "pack: one of mask and lengths must be given, got both"),
        ({"mask": torch.ones(3, 5)}, "pack: mask must be bool or an integer type, got float32"),
        ({"mask": torch.ones(3, 5, dtype=INT)}, r"pack: mask must have shape \[3, 4\], got \[3, 5\]"),
        ({"mask": None, "lengths": torch.ones(3)}, "pack: lengths must be int32 or int64, got float32"),
        ({"mask": None, "lengths": torch.ones(4, dtype=INT)}, r"pack: lengths must have shape \[3\], got \[4\]"),
        (
            {"mask": None, "lengths": torch.tensor([4, 5, 1])},
            "pack: lengths must be within 0 .* 4, got 5 at position 1",
        ),
        ({"mask": None, "lengths": torch.tensor([4, 1, -1])}, "pack: lengths must be .*, got -1 at position 2"),
        ({"capacity": 11}, "pack: capacity must be at least the number of tokens, 12, got 11"),
        ({"capacity": -1}, r"pack: capacity must be between 0 and 2\^31 - 1, got -1"),
        ({"capacity": 2**31}, r"pack: capacity must be between 0 and 2\^31 - 1, got 2147483648"),
        ({"capacity": "all"}, "pack: capacity must be a number, \"exact\" or None, got 'all'"),
    ],
)
def test_bad_input_of_pack_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        packseq.pack(**packable() | change)


def test_default_capacity_beyond_int32_is_named():
    padded, mask = torch.zeros(2**16, 2**15, 0), torch.zeros(1, 1, dtype=torch.bool).expand(2**16, 2**15)
    with pytest.raises(
        ValueError, match=r"between 0 and 2\^31 - 1, got 2147483648 \(batch \* length, as none is given"
    ):
        packseq.pack(padded, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.tensor(1.0)}, r"unpack: tokens must be \[capacity, ...\], got shape \[\]"),
        ({"places": torch.ones(6)}, r"unpack: places must be indices \(int64\) or cu_seqlens \(int32\), got float32"),
        ({"places": torch.arange(5)}, r"unpack: places must have shape \[6\], got \[5\]"),
        ({"places": torch.arange(6).int()}, r"unpack: places must have shape \[4\], got \[6\]"),
        ({"places": torch.tensor([0, 1, 3, 2, 4, 5])}, "unpack: places must increase .*, got 2 at position 3"),
        ({"places": torch.tensor([0, 1, 1, 2, 4, 5])}, "unpack: places must increase .*, got 1 at position 2"),
        ({"places": torch.tensor([0, 1, -1, 2, 4, 5])}, "unpack: places must increase .*, got 2 at position 3"),
        ({"places": torch.tensor([0, 1, 2, 3, 4, 12])}, "within the 12 rows .*, got 12 at position 5"),
        ({"places": torch.tensor([-2, 1, 2, 3, 4, 5])}, "unpack: places must increase .*, got -2 at position 0"),
        ({"places": torch.tensor([0, 5, 6, 6]).int()}, "at most the padded length 4, got 5 for sequence 0"),
        ({"places": torch.tensor([0, 3, 2, 6]).int()}, "unpack: places must not decrease"),
        ({"places": torch.tensor([0, 3, 4, 7]).int()}, "unpack: places must end within the 6 rows there are, got 7"),
        ({"batch": -1}, "unpack: batch and length must be at least 0, got -1 and 4"),
    ],
)
def test_bad_input_of_unpack_is_named(change, message):
    good = {"tokens": torch.zeros(6, 2), "places": torch.arange(6), "batch": 3, "length": 4}
    packseq.unpack(**good)
    with pytest.raises(ValueError, match=message):
        packseq.unpack(**good | change)


@pytest.mark.gpu
def test_other_devices_are_named():
    inputs = packable()
    with pytest.raises(ValueError, match="pack: mask must be on cpu like padded, got cuda:0"):
        packseq.pack(inputs["padded"], inputs["mask"].cuda())
    with pytest.raises(ValueError, match="unpack: places must be on cuda:0 like tokens, got cpu"):
        packseq.unpack(torch.zeros(6, device="cuda"), torch.arange(6), 3, 4)


@pytest.mark.gpu
def test_too_many_tokens_on_a_gpu(monkeypatch):
    mask = MASKS["holes"].cuda()
    padded = random(*mask.shape, 3, device="cuda")
    tokens, cu_seqlens, indices = packseq.pack(padded, mask, capacity=50)
    right = by_definition(padded, mask, mask.numel())
    assert_same((tokens, cu_seqlens, indices), (right[0][:50], right[1].clamp(max=50), right[2][:50]))
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")
    with pytest.raises(ValueError, match="capacity must be at least the number of tokens"):
        packseq.pack(padded, mask, capacity=50)
    with pytest.raises(ValueError, match="places must increase"):
        packseq.unpack(tokens, indices.flip(0), *mask.shape)


@pytest.mark.gpu
def test_malformed_places_on_a_gpu():
    """They give wrong rows, but touch no memory outside the tensors: run under compute-sanitizer, this says more."""
    tokens = random(100, 8, device="cuda")
    for places in (torch.randint(-(2**40), 2**40, (100,)), torch.randint(-(2**31), 2**31 - 1, (6,)).int()):
        out = packseq.unpack(tokens, places.cuda(), 5, 30)
        assert out.isfinite().all()


# ---- lists and jagged tensors


def sequences(*lengths: int, device: str = "cpu") -> list[Tensor]:
    return [random(n, 3, device=device) + i for i, n in enumerate(lengths)]


def test_lists(device):
    given_ = sequences(3, 0, 5, 1, device=device)
    tokens, cu_seqlens = packing.from_list(given_)
    assert cu_seqlens.tolist() == [0, 3, 3, 8, 9]
    assert cu_seqlens.dtype == INT
    assert cu_seqlens.device == tokens.device
    slack = torch.cat([tokens, tokens.new_full((4, 3), torch.nan)])
    for t in (tokens, slack):
        assert_same(tuple(packing.to_list(t, cu_seqlens)), tuple(given_))


def test_lists_have_gradients():
    given_ = [x.requires_grad_() for x in sequences(3, 0, 5)]
    tokens, cu_seqlens = packing.from_list(given_)
    sum((i + 1) * x.sum() for i, x in enumerate(packing.to_list(tokens, cu_seqlens))).backward()
    assert all(x.grad.equal(torch.full_like(x, i + 1)) for i, x in enumerate(given_))


@pytest.mark.parametrize("other", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=LONG), torch.tensor(1.0)])
def test_unlike_sequences_are_named(other):
    with pytest.raises(ValueError, match=r"must all be \[length, 3\] torch.float32 on cpu .*, got .* at position 1"):
        packing.from_list([torch.zeros(5, 3), other])


def test_no_sequences_are_named():
    with pytest.raises(ValueError, match="must hold at least one tensor"):
        packing.from_list([])


def test_jagged(device):
    given_ = sequences(3, 1, 5, device=device)
    jagged = torch.nested.nested_tensor(given_, layout=torch.jagged)
    tokens, cu_seqlens = packing.from_jagged(jagged)
    assert_same((tokens, cu_seqlens), packing.from_list(given_))
    assert tokens.data_ptr() == jagged.values().data_ptr()
    slack = torch.cat([tokens, tokens.new_full((4, 3), torch.nan)])
    for back in (packing.to_jagged(slack, cu_seqlens), packing.to_jagged(slack, cu_seqlens, total=9)):
        assert_same(tuple(back.unbind()), tuple(given_))
        assert_same((back.sum(1),), (torch.stack([x.sum(0) for x in given_]),))


def test_jagged_with_holes(device):
    dense = random(4, 10, 3, device=device)
    starts, lengths = torch.tensor([0, 2, 1, 9], device=device), torch.tensor([3, 0, 5, 1], device=device)
    jagged = torch.nested.narrow(dense, 1, starts, lengths, layout=torch.jagged)
    tokens, cu_seqlens = packing.from_jagged(jagged)
    wanted = [dense[i, s : s + n] for i, (s, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))]
    assert_same(tuple(packing.to_list(tokens, cu_seqlens)), tuple(wanted))
    assert not tokens[cu_seqlens[-1] :].any()


def test_jagged_has_gradients():
    given_ = [x.requires_grad_() for x in sequences(3, 1, 5)]
    jagged = torch.nested.as_nested_tensor(given_, layout=torch.jagged)
    tokens, cu_seqlens = packing.from_jagged(jagged)
    packing.to_jagged(tokens * 2, cu_seqlens).values().sum().backward()
    assert all(x.grad.equal(torch.full_like(x, 2)) for x in given_)


def test_other_nested_tensors_are_named():
    with pytest.raises(ValueError, match=r"must be a nested tensor of layout torch\.jagged"):
        packing.from_jagged(torch.zeros(2, 3))
    jagged = torch.nested.nested_tensor(sequences(3, 1, 5), layout=torch.jagged)
    with pytest.raises(ValueError, match="must be ragged in dimension 1"):
        packing.from_jagged(jagged.transpose(1, 2))


# ---- position ids and sequence numbers


@pytest.mark.parametrize(
    ("ids", "boundaries"),
    [
        ([0, 1, 2, 0, 1, 0], [0, 3, 5, 6]),
        ([2, 3, 4, 2, 3, 2], [0, 3, 5, 6]),  # RoBERTa's begin at 2
        ([0, 0, 0], [0, 1, 2, 3]),  # texts of one token each
        ([0, 1, 2, 3, 5, 6], [0, 4, 6]),  # a gap is a boundary
        ([7, 8, 9], [0, 3]),  # a piece of a longer text
        ([3, 4, 0, 1], [0, 2, 4]),
        ([5, 4, 3], [0, 1, 2, 3]),
        ([0], [0, 1]),
        ([], [0]),
    ],
)
@pytest.mark.parametrize("dtype", [INT, LONG], ids=str)
def test_position_ids(ids, boundaries, dtype, device):
    ids = torch.tensor(ids, dtype=dtype, device=device)
    room = len(boundaries) - 1
    for x in (ids, ids[None]):
        assert packing.from_position_ids(x, max_sequences=room).tolist() == boundaries
        assert packing.from_position_ids(x, max_sequences=room + 2).tolist() == boundaries + boundaries[-1:] * 2
        every = packing.from_position_ids(x)
        assert every.dtype == INT
        assert every.is_contiguous()
        assert every.device == ids.device
        assert every.tolist() == boundaries + boundaries[-1:] * (len(ids) - room)


def test_position_ids_of_several_rows(device):
    """Each row begins a sequence, even where the ids of the row before would go on."""
    ids = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]], device=device)
    assert packing.from_position_ids(ids, max_sequences=4).tolist() == [0, 3, 4, 6, 8]
    assert packing.from_position_ids(ids.t().contiguous().t(), max_sequences=4).tolist() == [0, 3, 4, 6, 8]


def test_padding_with_constant_ids(device):
    """Without a mask such padding is sequences of one token, or seems to be the first of the text behind it. With one
    it is a sequence of its own, or slack at the end."""
    ids = torch.tensor([2, 3, 4, 1, 1, 1, 2, 3, 1, 1], device=device)
    mask = ids != 1
    assert packing.from_position_ids(ids, max_sequences=7).tolist() == [0, 3, 4, 5, 8, 9, 10, 10]
    for m in (mask, mask.long()):
        assert packing.from_position_ids(ids, m, max_sequences=5).tolist() == [0, 3, 6, 8, 8, 8]
    nothing = torch.zeros_like(mask)
    assert packing.from_position_ids(ids, nothing, max_sequences=2).tolist() == [0, 0, 0]


def test_left_padded_rows_of_position_ids(device):
    """As Hugging Face makes them in generation: padding's ids are 1, the texts begin at 0."""
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], device=device)
    ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    boundaries = packing.from_position_ids(ids, mask, max_sequences=6)
    assert boundaries.tolist() == [0, 2, 4, 5, 8, 12, 12]


def test_padding_at_the_end_of_rows(device):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], device=device)
    ids = torch.arange(4, device=device).expand(3, 4)
    assert packing.from_position_ids(ids, mask, max_sequences=5).tolist() == [0, 2, 4, 8, 11, 11]


def test_too_many_sequences():
    ids = torch.tensor([0, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="max_sequences must be at least the number of sequences, 3, got 2"):
        packing.from_position_ids(ids, max_sequences=2)
    with pytest.raises(ValueError, match="from_seq_idx: max_sequences must be at least 0, got -1"):
        packing.from_seq_idx(ids, max_sequences=-1)


@pytest.mark.gpu
def test_too_many_sequences_on_a_gpu_become_slack(monkeypatch):
    ids = torch.tensor([0, 1, 0, 1, 0], device="cuda")
    assert packing.from_position_ids(ids, max_sequences=2).tolist() == [0, 2, 4]
    assert packing.from_position_ids(ids, max_sequences=0).tolist() == [0]
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")
    with pytest.raises(ValueError, match="max_sequences must be at least the number of sequences, 3, got 2"):
        packing.from_position_ids(ids, max_sequences=2)


@pytest.mark.parametrize(
    ("numbers", "boundaries"),
    [
        ([0, 0, 0, 1, 1, 2], [0, 3, 5, 6]),
        ([5, 5, 3, 3, 9], [0, 2, 4, 5]),  # any numbers that differ
        ([0, 0, -1, -1, 1, -1], [0, 2, 4, 5]),  # padding between, and slack
        ([-1, -1], [0]),
        ([], [0]),
    ],
)
def test_sequence_numbers(numbers, boundaries, device):
    numbers = torch.tensor(numbers, dtype=INT, device=device)
    room = len(boundaries) - 1
    assert packing.from_seq_idx(numbers, max_sequences=room).tolist() == boundaries
    assert packing.from_seq_idx(numbers[None], max_sequences=room + 1).tolist() == boundaries + boundaries[-1:]


def test_sequence_numbers_of_several_rows(device):
    """Each row counts from 0 on."""
    numbers = torch.tensor([[0, 0, 1], [1, 1, 2]], device=device)
    assert packing.from_seq_idx(numbers, max_sequences=4).tolist() == [0, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        (packing.from_position_ids, torch.zeros(3), "position_ids must be an integer type, got torch.float32"),
        (packing.from_seq_idx, torch.zeros(3) == 0, "seq_idx must be an integer type, got torch.bool"),
        (packing.from_position_ids, torch.zeros(3, 1, 4).long(), r"\[total\] or \[batch, length\], got .*3, 1, 4"),
    ],
)
def test_bad_ids_are_named(function, wrong, message):
    with pytest.raises(ValueError, match=message):
        function(wrong)


def test_bad_mask_of_position_ids_is_named():
    ids = torch.zeros(3, dtype=LONG)
    with pytest.raises(ValueError, match=r"from_position_ids: mask must be \[3\] on cpu, got \[1, 3\] on cpu"):
        packing.from_position_ids(ids, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool or an integer type, got torch\.float32"):
        packing.from_position_ids(ids, torch.ones(3))


# ---- laws


@st.composite
def masks_and_rows(draw) -> tuple[Tensor, Tensor]:
    batch, length, row = draw(st.integers(0, 6)), draw(st.integers(0, 40)), draw(st.integers(0, 5))
    bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    return torch.tensor(bits, dtype=torch.bool).view(batch, length), random(batch, length, row)


@settings(deadline=None, max_examples=100)
@given(masks_and_rows(), st.integers(0, 9))
def test_law_unpacking_undoes_packing(case, spare):
    mask, padded = case
    tokens, cu_seqlens, indices = packseq.pack(padded, mask, capacity=int(mask.sum()) + spare)
    assert packseq.unpack(tokens, indices, *mask.shape).equal(padded * mask[..., None])
    assert packseq.pack(packseq.unpack(tokens, indices, *mask.shape, fill=9), mask, capacity=len(tokens))[0].equal(
        tokens
    )
    for row, keep, sequence in zip(padded, mask, packing.to_list(tokens, cu_seqlens), strict=True):
        assert sequence.equal(row[keep])


@settings(deadline=None, max_examples=100)
@given(masks_and_rows())
def test_law_packing_and_unpacking_are_adjoint(case):
    mask, padded = case
    tokens, _, indices = packseq.pack(padded, mask)
    other = random(*tokens.shape) * 2 - 30
    back = packseq.unpack(other, indices, *mask.shape)
    assert (tokens.double() * other).sum() == (padded.double() * back).sum()  # of small integers: exact


lengths_of_sequences = st.lists(st.integers(0, 12), max_size=12)


@settings(deadline=None, max_examples=100)
@given(lengths_of_sequences, st.integers(0, 5))
def test_law_boundaries_survive_ids_and_numbers(lengths, slack):
    """But for empty sequences, which leave no trace in either."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu_seqlens[-1]) + slack
    full = [n for n in lengths if n > 0]
    wanted = torch.tensor([0, *full, 0, 0]).cumsum(0).int()
    numbers, ids = packing.to_seq_idx(cu_seqlens, total), packing.to_position_ids(cu_seqlens, total)
    assert packing.from_seq_idx(numbers, max_sequences=len(full) + 2).equal(wanted)
    assert packing.from_position_ids(ids, numbers >= 0, max_sequences=len(full) + 2).equal(wanted)
    assert packing.from_position_ids(ids + 2, numbers >= 0, max_sequences=len(full) + 2).equal(wanted)


@settings(deadline=None, max_examples=50)
@given(lengths_of_sequences, st.integers(0, 5))
def test_law_boundaries_are_places(lengths, slack):
    """Unpacking by boundaries, packing by lengths."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total, longest = int(cu_seqlens[-1]), max(lengths, default=0) + 1
    tokens = torch.cat([random(total, 2), torch.full((slack, 2), torch.nan)])
    padded = packseq.unpack(tokens, cu_seqlens, len(lengths), longest)
    again, boundaries, _ = packseq.pack(padded, lengths=cu_seqlens.diff(), capacity=total)
    assert again.equal(tokens[:total])
    assert boundaries.equal(cu_seqlens)
