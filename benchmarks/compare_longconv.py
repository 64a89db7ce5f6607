"""packseq's long convolution against torch.fft (padded to the longest where lengths differ) and against a copy of as
many bytes, and its filters' sums against the arithmetic they cannot do without, on one GPU in one run.

    python benchmarks/compare_longconv.py --out benchmarks/results/h200
"""

import argparse
import sys

import packseq
import torch
from longconv_cases import Case, longconv_cases
from report import environment, geometric_mean, write
from timing import time_cuda
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # ||a - b|| / ||b||
_POLES = 32  # conjugate pairs of the filters' cases
_FILTERS = ((256, 4096), (1024, 4096), (1024, 16384))  # rows, nodes
_LANES = 132 * 128 * 1.755e9  # float32 operations of an H200 a second
# Operations of a conjugate pair at one node: a reciprocal is eight lanes' time; and a product of two real vectors.
_PAIR = {"cauchy": 14 + 8, "vandermonde": 2}


class Convolution:
    """One case's tensors, packed, and padded as [batch, channels, length]."""

    def __init__(self, case: Case, dtype: torch.dtype):
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator)

        self.case = case
        lengths = torch.tensor(case.lengths, device="cuda")
        self.cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        self.real = torch.arange(case.longest, device="cuda") < lengths[:, None]
        self.u, self.dout = (random(case.total, case.channels).to(dtype) for _ in range(2))
        self.k = random(case.channels, case.longest) * torch.exp(-torch.arange(case.longest, device="cuda") / 500)
        self.leaves = [self.u.requires_grad_(), self.k.requires_grad_()]
        self.padded, self.padded_dout = self.pad(self.u.detach()).requires_grad_(), self.pad(self.dout)

    def pad(self, x: Tensor) -> Tensor:
        full = x.new_zeros(*self.real.shape, x.shape[1])
        full[self.real] = x
        return full.transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[self.real]

    def ours(self) -> Tensor:
        return packseq.long_conv(self.u, self.k, self.cu_seqlens)

    def theirs(self) -> Tensor:
        n = 2 * self.case.longest
        spectrum = torch.fft.rfft(self.padded.float(), n) * torch.fft.rfft(self.k, n)
        return torch.fft.irfft(spectrum, n)[..., : self.case.longest].to(self.padded.dtype)


def peak_bytes(step) -> int:
    """What a training step takes at its peak, above what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compare(case: Case, dtype: torch.dtype, seconds: float) -> list[dict]:
    x = Convolution(case, dtype)
    out, peer = x.ours(), x.theirs()

    def our_gradients():
        return torch.autograd.grad(out, x.leaves, x.dout, retain_graph=True)

    def peer_gradients():
        return torch.autograd.grad(peer, [x.padded, x.k], x.padded_dout, retain_graph=True)

    (du, dk), (peer_du, peer_dk) = our_gradients(), peer_gradients()
    for name, a, b in (("out", out, x.unpad(peer)), ("du", du, x.unpad(peer_du)), ("dk", dk, peer_dk)):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error < _TOLERANCE[dtype]:  # NaN too
            sys.exit(f"{case.name}: packseq's and torch's {name} differ by {error:.2e}, allowed {_TOLERANCE[dtype]}")
    del du, dk, peer_du, peer_dk

    def without_gradients(call):
        with torch.no_grad():
            return call()

    target = torch.empty_like(x.u)
    calls = {
        "forward": {"packseq": lambda: without_gradients(x.ours), "torch.fft": lambda: without_gradients(x.theirs)},
        "backward": {"packseq": our_gradients, "torch.fft": peer_gradients},
    }
    calls["forward"]["copy"] = lambda: target.copy_(x.u.detach())
    times = {direction: time_cuda(contestants, seconds) for direction, contestants in calls.items()}
    out = peer = target = None  # their graphs hold memory
    calls.clear()
    peaks = [
        peak_bytes(lambda: torch.autograd.grad(x.ours(), x.leaves, x.dout)),
        peak_bytes(lambda: torch.autograd.grad(x.theirs(), [x.padded, x.k], x.padded_dout)),
    ]
    return [
        {
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "direction": direction,
            "packseq ms": ms["packseq"],
            "torch.fft ms": ms["torch.fft"],
            "over torch.fft": ms["torch.fft"] / ms["packseq"],
            "over a copy": ms["packseq"] / times["forward"]["copy"],
            "memory of torch.fft's": peaks[0] / peaks[1],
        }
        for direction, ms in times.items()
    ]


def filters(rows: int, nodes: int, seconds: float) -> list[dict]:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    n = torch.arange(_POLES, device="cuda")
    w = (-0.5 + 1j * torch.pi * n).expand(rows, -1).to(torch.complex64).contiguous()
    v, B, C, P = (torch.complex(random(rows, _POLES), random(rows, _POLES)) for _ in range(4))
    dt = torch.exp(random(rows).clamp(-2, 2) - 5)
    angle = torch.pi * torch.arange(nodes, device="cuda") / nodes
    z = torch.complex(torch.zeros_like(angle), 2 * torch.tan(angle / 2))
    length = 2 * (nodes - 1)
    operators = {
        "cauchy": (lambda v, w: packseq.cauchy_conj(v, z, w), (v, dt[:, None] * w)),
        "vandermonde": (lambda v, x: packseq.vandermonde_conj(v, x, nodes), (v, dt[:, None] * w)),
        "s4 spectrum": (
            lambda w, P, B, C, dt: torch.ops.packseq.s4_spectrum(w, B, C[None], dt, length, P[None]),
            (w, P, B, C, dt),
        ),
    }
    table = []
    for name, (call, inputs) in operators.items():
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(*leaves)
        seed = torch.randn_like(out)

        def forward(call=call, leaves=leaves):
            with torch.no_grad():
                return call(*leaves)

        def backward(out=out, leaves=leaves, seed=seed):
            return torch.autograd.grad(out, leaves, seed, retain_graph=True)

        floor = rows * nodes * _POLES * _PAIR[name] / _LANES * 1e3 if name in _PAIR else None
        for direction, timed in (("forward", forward), ("backward", backward)):
            ms = time_cuda({"packseq": timed}, seconds)["packseq"]
            table.append(
                {
                    "case": f"{name} H{rows} L{nodes}",
                    "direction": direction,
                    "packseq ms": ms,
                    "T pairs/s": rows * nodes * _POLES / ms * 1e-9,
                    "over the forward's arithmetic": ms / floor if floor else None,
                }
            )
            print(f"{table[-1]['case']:28} {direction:9} {ms:.3f} ms", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only cases whose name holds one of these, comma-separated")
    parser.add_argument("--quick", action="store_true", help="a third of the samples")
    parser.add_argument("--out", help="folder for longconv.json, longconv.md, filters.json and filters.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    cases = [c for c in longconv_cases() if any(word in c.name for word in options.rows.split(","))]
    if not cases:
        parser.error(f"--rows {options.rows!r} matches none of {[c.name for c in longconv_cases()]}")
    if not torch.cuda.is_available():
        sys.exit("compare_longconv.py compares on a GPU, and torch sees none")

    seconds = 0.02 if options.quick else 0.06
    env = environment(options.commit)
    table = [row for shape in _FILTERS for row in filters(*shape, seconds)]
    write(options.out, "filters", f"Sums of S4's filters on the GPU, {_POLES} conjugate pairs", env, table, [])
    rows = []
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            rows += compare(case, dtype, seconds)
            print(f"{case.name:12} {rows[-1]['dtype']:9} {[round(r['packseq ms'], 3) for r in rows[-2:]]}", flush=True)
    ratio = geometric_mean([row["over torch.fft"] for row in rows])
    write(options.out, "longconv", "Long convolution on the GPU", env, rows, [f"{ratio:.2f} of torch.fft's rate"])


if __name__ == "__main__":
    main()
