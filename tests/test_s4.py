"""packseq.nn's S4, S4D, H3 and LSSL: against plain recurrences in float64, against each other, packed against alone,
and token by token against the convolution.

The operators give a sequence the same bits in any pack; the matrix products around them are the BLAS library's. So, as
for Mamba, it holds with the same rows, whatever the other sequences hold; alone and packed, results differ by rounding.
"""

import copy

import longconv_reference as reference
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from operators import boundaries, captured, random
from packseq.nn import H3, LSSL, S4, S4D, hippo
from tensors import real
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
LENGTHS = [5, 0, 90, 1, 23]
TOTAL = sum(LENGTHS)
D_MODEL, L_MAX = 32, 96

LAYERS = {
    "S4": lambda **o: S4(D_MODEL, L_MAX, 16, **o),
    "S4 legt": lambda **o: S4(D_MODEL, L_MAX, 16, init="legt", glu=False, **o),
    "S4 fourier": lambda **o: S4(D_MODEL, L_MAX, 16, init="fourier", **o),
    "S4 both ways": lambda **o: S4(D_MODEL, L_MAX, 16, bidirectional=True, **o),
    "S4D": lambda **o: S4D(D_MODEL, L_MAX, 16, **o),
    "S4D inv bilinear": lambda **o: S4D(D_MODEL, L_MAX, 16, init="inv", discretization="bilinear", **o),
    "S4D lin both ways": lambda **o: S4D(D_MODEL, L_MAX, 16, init="lin", bidirectional=True, glu=False, **o),
    "H3": lambda **o: H3(D_MODEL, L_MAX, 16, shift_states=8, **o),
    "H3 heads": lambda **o: H3(D_MODEL, L_MAX, 16, shift_states=8, head_dim=4, **o),
    "LSSL": lambda **o: LSSL(D_MODEL, L_MAX, 8, **o),
}
layers = pytest.mark.parametrize("name", LAYERS)
stepping = pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("S4") and "both" not in n])
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t).removeprefix("torch."))


def make(name: str, device: str = "cpu", dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().to(device, dtype)


def hidden_rows(total: int = TOTAL, dtype: torch.dtype = F32, device: str = "cpu", width: int = D_MODEL) -> Tensor:
    return random(total, width, seed="hidden", dtype=F32).to(device, dtype)


# ---- what the layers compute


def system(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The discrete system of each channel, complex128 over both halves of the conjugate pairs: Abar, Bbar and C."""
    ssm = layer.ssm
    w, B = ssm.poles().to(torch.complex128), torch.view_as_complex(ssm.B.double())
    P = torch.view_as_complex(ssm.P.double()) if hasattr(ssm, "P") else None
    C = torch.view_as_complex(ssm.C.double()) if P is None else ssm.output_rows().to(w.dtype)
    model = reference.dense_model(w, B, ssm.dt().double(), P, ssm.discretization == "zoh")
    return *model, torch.cat([C, C.conj()], dim=-1)


def recurrence(Abar: Tensor, Bbar: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Of one sequence, step by step: ``[filters, rows, channels]``."""
    state, ys = torch.zeros_like(Bbar), []
    for row in u:
        state = (Abar @ state[..., None])[..., 0] + Bbar * row[:, None]
        ys.append((C * state).sum(-1).real)
    return torch.stack(ys, dim=1)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("S4")])
@torch.no_grad()
def test_convolution_is_the_recurrence(device, name):
    layer, u = make(name, device), hidden_rows(L_MAX, device=device)
    there = u.double()
    ahead = recurrence(*system(layer), there)
    y = ahead[0] + layer.ssm.D.double() * there
    if layer.bidirectional:  # the second filter's newest tap is that of the next row
        y[:-1] += recurrence(*system(layer), there.flip(0))[1].flip(0)[1:]
    expected = layer.double().project(y)
    layer = make(name, device)
    torch.testing.assert_close(layer(u).double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("measure", hippo.MEASURES)
@torch.no_grad()
def test_s4_is_lssl_with_the_same_matrix(measure):
    torch.manual_seed(0)
    dense, fast = LSSL(3, 200, 12, init=measure, dtype=F64), S4(3, 200, 12, init=measure, dtype=F64)
    V = hippo.diagonal_plus_low_rank(measure, 12).V
    fast.ssm.log_dt.copy_(dense.log_dt)
    if measure != "legs":  # S4 moves poles on the imaginary axis a little to the left
        dense.A.sub_(0.01 * torch.eye(12))
    fast.ssm.C.copy_(torch.view_as_real(dense.C.to(V.dtype) @ V)[None])
    fast.ssm.length = 0  # so this is the model's own C
    fast.ssm.set_length(200)
    expected = dense.filters(200)[0]
    torch.testing.assert_close(fast.filters(200)[0], expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("head_dim", [1, 4])
@torch.no_grad()
def test_h3_multiplies_as_published(device, head_dim):
    layer = make("H3 heads" if head_dim == 4 else "H3", device)
    x = hidden_rows(40, device=device)
    wide = copy.deepcopy(layer).double()
    q, k, v = wide.in_proj(x.double()).chunk(3, dim=1)
    taps, past = wide.shift, F.pad(k.T, (7, 0))
    k = wide.shift_D * k + torch.stack([(past[:, t : t + 8].flip(1) * taps).sum(1) for t in range(40)])
    Abar, Bbar, C = system(layer)
    q, k, v = (rows.view(40, -1, head_dim) for rows in (q, k, v))
    out = torch.zeros_like(v)
    for i in range(head_dim):
        for j in range(head_dim):
            product = k[..., i] * v[..., j]
            y = recurrence(Abar, Bbar, C, product)[0] + wide.ssm.D * product
            out[..., j] += q[..., i] * y
    expected = wide.out_proj(out.flatten(1))
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["S4", "S4 legt", "S4 fourier"])
@torch.no_grad()
def test_filters_of_any_length_are_of_the_same_model(name):
    layer = make(name, dtype=F64)
    before, C = layer.filters(L_MAX), layer.ssm.output_rows()
    limit = 1e-8 * before.abs().max().item()
    for length in (1, 17, 1047, 4096, L_MAX):
        layer.set_length(length)
        assert layer.l_max == layer.ssm.length == length
        torch.testing.assert_close(layer.ssm.output_rows(), C, rtol=0, atol=1e-8)
        shared = min(length, L_MAX)
        assert layer.filters(length).shape[-1] == length
        torch.testing.assert_close(layer.filters(shared), before[..., :shared], rtol=0, atol=limit)
    impulse = F.pad(torch.ones(1, D_MODEL, dtype=F64), (0, 0, 0, 299))
    layer.set_length(300)
    expected = recurrence(*system(layer), impulse)[0].T
    torch.testing.assert_close(layer.filters(300)[0], expected, rtol=0, atol=limit)


@pytest.mark.parametrize("name", ["S4 legt", "S4 both ways", "S4D", "S4D inv bilinear", "H3 heads", "LSSL"])
def test_gradients_of_everything(name):
    torch.manual_seed(0)
    small = {
        "S4 legt": lambda: S4(2, 9, 4, init="legt", dt_min=0.1, dtype=F64),
        "S4 both ways": lambda: S4(2, 9, 4, bidirectional=True, dt_min=0.1, dtype=F64),
        "S4D": lambda: S4D(2, 9, 4, dt_min=0.1, dtype=F64),
        "S4D inv bilinear": lambda: S4D(2, 9, 4, init="inv", discretization="bilinear", dt_min=0.1, dtype=F64),
        "H3 heads": lambda: H3(4, 9, 2, shift_states=3, head_dim=2, dt_min=0.1, dtype=F64),
        "LSSL": lambda: LSSL(2, 9, 3, dt_min=0.1, dtype=F64),
    }
    layer, cu_seqlens = small[name](), boundaries([4, 0, 7])
    names = [n for n, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, cu_seqlens))

    inputs = [hidden_rows(12, dtype=F64, width=layer.d_model), *layer.parameters()]
    assert torch.autograd.gradcheck(function, [x.detach().requires_grad_() for x in inputs], fast_mode=True)


# ---- packed


@layers
@dtypes
def test_packed_is_each_alone(device, name, dtype):
    layer, x = make(name, device, dtype), hidden_rows(dtype=dtype, device=device)
    packed = layer(x, boundaries(LENGTHS, device))
    assert packed.dtype == dtype
    alone = torch.cat([layer(rows) for rows in x.split(LENGTHS)])
    limit = 8 * torch.finfo(dtype).eps * alone.abs().max().item()
    torch.testing.assert_close(packed, alone, rtol=0, atol=limit)


@layers
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("how", ["cast", "autocast"])
@torch.no_grad()
def test_half_types_are_near_float32(device, name, dtype, how):
    x, cu_seqlens = hidden_rows(device=device), boundaries(LENGTHS, device)
    layer, exact = make(name, device, dtype if how == "cast" else F32), make(name, device)
    exact.load_state_dict(layer.state_dict())  # the same weights, rounded where the layer's are
    with torch.autocast(device, dtype, enabled=how == "autocast"):
        out = layer(x.to(layer.out_proj.weight.dtype), cu_seqlens)
    assert out.dtype == dtype
    expected = exact(x.to(layer.out_proj.weight.dtype).float(), cu_seqlens)
    limit = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=limit)


@layers
def test_a_sequence_never_sees_another(device, name):
    layer, cu_seqlens = make(name, device), boundaries(LENGTHS, device)
    first, last = sum(LENGTHS[:2]), sum(LENGTHS[:3])

    def run(other: float) -> tuple[Tensor, Tensor]:
        x = torch.cat([hidden_rows(device=device), hidden_rows(3, device=device)])
        x[last:] = other
        x.requires_grad_()
        out = layer(x, cu_seqlens)
        out[first:last].sum().backward()
        return out.detach()[first:last], x.grad[first:last]

    for got, expected in zip(run(float("nan")), run(1.0), strict=True):
        assert got.isfinite().all()
        assert_same_bits(name, got, expected)


@layers
def test_rows_after_the_last_sequence(device, name):
    layer, cu_seqlens = make(name, device), boundaries(LENGTHS, device)
    results = []
    for slack in (0, 7):
        layer.zero_grad()
        x = F.pad(hidden_rows(device=device), (0, 0, 0, slack), value=float("nan")).requires_grad_()
        out = layer(x, cu_seqlens)
        out.square().sum().backward()
        assert not out[TOTAL:].any()
        assert not x.grad[TOTAL:].any()
        results.append([out.detach()[:TOTAL], x.grad[:TOTAL], *(p.grad for p in layer.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@layers
def test_nothing_at_all(device, name):
    layer = make(name, device)
    for lengths in ([], [0, 0]):
        assert layer(hidden_rows(0, device=device), boundaries(lengths, device)).shape == (0, D_MODEL)
    assert layer(hidden_rows(0, device=device)).shape == (0, D_MODEL)


@layers
def test_gradients_reach_all_parameters(device, name):
    layer = make(name, device)
    layer(hidden_rows(device=device), boundaries(LENGTHS, device)).square().sum().backward()
    for parameter, p in layer.named_parameters():
        assert p.grad.isfinite().all(), parameter
        assert p.grad.any(), parameter


@layers
@torch.no_grad()
def test_fewer_taps_are_enough_for_shorter_sequences(device, name):
    layer, x, cu_seqlens = make(name, device), hidden_rows(device=device), boundaries(LENGTHS, device)
    expected = layer(x, cu_seqlens)
    got = layer(x, cu_seqlens, max_length=90)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ---- token by token


@stepping
@torch.no_grad()
def test_steps_are_the_convolution(device, name):
    """A prompt each, then three tokens, one by one and at once, in slots of a pool."""
    layer, cu_seqlens = make(name, device), boundaries(LENGTHS, device)
    x, slots = hidden_rows(device=device), torch.tensor([4, 0, 6, -1, 2], dtype=torch.int32, device=device)
    more = random(len(LENGTHS), 5, D_MODEL, seed="more", dtype=F32).to(device)
    rows = [torch.cat(parts) for parts in zip(x.split(LENGTHS), more, strict=True)]
    expected = [layer(sequence) for sequence in rows]
    pool = layer.allocate_states(7)
    states = pool.h if isinstance(layer, S4) else pool
    states[1].fill_(7)
    prompts = layer.step(x, pool, cu_seqlens, indices=slots).split(LENGTHS)
    ones = [layer.step(more[:, t], pool, indices=slots) for t in range(3)]
    together = layer.step(more[:, 3:].flatten(0, 1), pool, boundaries([2] * 5, device), indices=slots).view(5, 2, -1)
    limit = 1e-5 * max(y.abs().max().item() for y in expected)
    for i in (0, 1, 2, 4):
        got = torch.cat([prompts[i], *(y[i : i + 1] for y in ones), together[i]])
        torch.testing.assert_close(got, expected[i], rtol=0, atol=limit)
    assert (states[1] == 7).all()
    assert not states[[3, 5]].any()


@pytest.mark.parametrize("name", ["S4D", "S4D inv bilinear"])
def test_s4d_goes_on_from_states(device, name):
    layer, length = make(name, device), 80
    x = hidden_rows(length, device=device)
    expected = layer(x)
    first, states = layer(x[:33], return_final_states=True)
    second, final = layer(x[33:], initial_states=states, return_final_states=True)
    limit = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=limit)
    ways, parameters = (torch.cat([first, second]), expected), list(layer.parameters())
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in ways]
    for got, right in zip(*grads, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5 * right.abs().max().item())
    pool = layer.allocate_states(1)
    layer.step(x, pool, boundaries([length], device))
    torch.testing.assert_close(pool, final.detach(), rtol=0, atol=1e-5 * pool.abs().max().item())


@pytest.mark.parametrize("name", ["S4", "S4 fourier", "S4D", "S4D inv bilinear"])
@torch.no_grad()
def test_convolution_and_recurrence_agree_over_16384_steps(device, name):
    torch.manual_seed(0)
    length, kind, *options = 16384, *name.split()
    if kind == "S4":
        layer = S4(4, length, 16, init=(options or ["legs"])[0])
    else:
        layer = S4D(4, length, 16, **dict(zip(("init", "discretization"), options, strict=False)))
    layer, x = layer.to(device), random(length, 4, seed="long", dtype=F32).to(device)
    expected = layer(x)
    got = layer.step(x, layer.allocate_states(1), boundaries([length], device))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# ---- as a module


@layers
@torch.no_grad()
def test_state_dicts_go_round(name, tmp_path):
    layer, x = make(name), hidden_rows()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = LAYERS[name]()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    cu_seqlens = boundaries(LENGTHS)
    for same in (other, copy.deepcopy(layer)):
        assert_same_bits(name, same(x, cu_seqlens), layer(x, cu_seqlens))


@torch.no_grad()
def test_length_goes_through_state_dicts():
    layer, other = make("S4"), make("S4")
    layer.set_length(200)
    other.load_state_dict(layer.state_dict())
    assert other.l_max == 200
    assert_same_bits("out", other(hidden_rows(200)), layer(hidden_rows(200)))


@pytest.mark.parametrize("name", ["S4", "S4 both ways", "S4D", "H3", "LSSL"])
def test_compiles_whole_and_recompiles_once(device, name):
    layer = make(name, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in ([5, 3, 8], [4, 0, 2, 9, 7], [31, 2, 2, 2, 2, 17, 70]):
        x, cu_seqlens = hidden_rows(sum(lengths), device=device), boundaries(lengths, device)
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            out = function(x, cu_seqlens)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in layer.parameters())])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert counter.frame_count <= 2, "recompiled more than once"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["S4", "S4 both ways", "S4D", "H3 heads", "LSSL"])
@torch.no_grad()
def test_no_copy_to_the_host(name):
    layer, x, cu_seqlens = make(name, "cuda"), hidden_rows(device="cuda"), boundaries(LENGTHS, "cuda")
    pool = layer.allocate_states(len(LENGTHS)) if name in ("S4", "S4D") else None
    layer(x, cu_seqlens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, cu_seqlens)
        if pool is not None:
            layer.step(x, pool, cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("name", ["S4", "S4 both ways", "S4D", "H3", "H3 heads", "LSSL"])
@torch.no_grad()
def test_graphs_replay_with_other_boundaries(name, dtype):
    layer, x = make(name, "cuda", dtype), hidden_rows(200, dtype, "cuda")
    cu_seqlens = boundaries([50, 0, 70, 1], "cuda")
    now, slots = hidden_rows(4, dtype, "cuda"), torch.tensor([3, 1, -1, 5], dtype=torch.int32, device="cuda")
    steps = name in ("S4", "S4D")
    pool = layer.allocate_states(6) if steps else None
    states = ((pool.h if isinstance(layer, S4) else pool),) if steps else ()

    def work() -> list[Tensor]:
        outs = [layer(x, cu_seqlens)]
        return [*outs, layer.step(now, pool, indices=slots)] if steps else outs

    graph, outs = captured(work)
    for lengths in ([50, 0, 70, 1], [1, 80, 80, 39], [0, 0, 0, 7]):
        for rows in (x, now):
            rows.copy_(rows.roll(1, 0))
        slots.copy_(slots.roll(1))
        cu_seqlens.copy_(boundaries(lengths))
        before = [h.clone() for h in states]
        graph.replay()
        got = [y.clone() for y in (*outs, *states)]
        for h, old in zip(states, before, strict=True):
            h.copy_(old)
        for i, (y, expected) in enumerate(zip(got, [*work(), *states], strict=True)):
            assert_same_bits(f"{i} of {lengths}", real(y), real(expected))


# ---- bad input


@layers
def test_bad_input_is_named(name):
    layer, kind = make(name), name.split()[0]
    for bad in (torch.zeros(2, 3, D_MODEL), torch.zeros(3, 5), torch.zeros(3, D_MODEL, dtype=torch.int64)):
        with pytest.raises(ValueError, match=rf"^{kind}: hidden must be packed, \[total, 32\], floating point, got"):
            layer(bad)
    x = hidden_rows(100)
    for cu_seqlens, message in (
        (torch.zeros(3, dtype=torch.int64), r"cu_seqlens must be int32 .* got \(3,\) of torch.int64"),
        (boundaries([50, 51]), "cu_seqlens must .* end within the 100 rows"),
        (boundaries([97, 3]), "a sequence may have at most l_max = 96 rows, got one of 97"),
        (None, "a sequence may have at most l_max = 96 rows, got one of 100"),
    ):
        with pytest.raises(ValueError, match=f"^{kind}: {message}"):
            layer(x, cu_seqlens)
    with pytest.raises(ValueError, match=f"^{kind}: a sequence may have at most max_length = 49 rows, got one of 50"):
        layer(x, boundaries([50, 50]), max_length=49)
    with pytest.raises(ValueError, match=f"^{kind}: max_length must be positive, got 0"):
        layer(x, boundaries([50, 50]), max_length=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S4(0, 5), "S4: d_model and l_max must be positive, got 0 and 5"),
        (lambda: S4D(5, 0), "S4D: d_model and l_max must be positive, got 5 and 0"),
        (lambda: S4(4, 5, dropout=1.0), "S4: dropout must be at least 0 and less than 1, got 1.0"),
        (lambda: S4(4, 5, 7), "states must be even and positive, got 7"),
        (lambda: S4(4, 5, init="lin"), "measure must be one of 'legs', 'legt', 'fourier', got 'lin'"),
        (lambda: S4D(4, 5, init="legt"), "kind must be one of 'legs', 'lin', 'inv', got 'legt'"),
        (lambda: S4D(4, 5, discretization="euler"), 'discretization must be "zoh" or "bilinear", got \'euler\''),
        (lambda: S4(4, 5).set_length(0), "length must be positive, got 0"),
        (lambda: S4(4, 5)(torch.zeros(3, 4), max_length=6), "the filter has 5 taps and 6 were asked for"),
        (lambda: H3(4, 5, head_dim=3), "H3: head_dim must divide d_model = 4, got 3"),
        (lambda: H3(4, 5, shift_states=0), "H3: d_model, l_max and shift_states must be positive, got 4, 5 and 0"),
        (lambda: LSSL(4, 5, init="inv"), "measure must be one of"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bidirectional_layers_have_no_steps():
    for name in ("S4 both ways", "S4D lin both ways"):
        layer = make(name)
        with pytest.raises(ValueError, match="a bidirectional layer has no states"):
            layer.step(hidden_rows(2), layer.allocate_states(2))
    with pytest.raises(ValueError, match="S4D: a bidirectional layer has no states"):
        layer(hidden_rows(5), return_final_states=True)
