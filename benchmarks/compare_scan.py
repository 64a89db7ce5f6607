"""packseq's selective scan against mamba-ssm's CUDA kernel, where that is installed, and its causal convolution against
a copy of as many bytes, on one GPU in one run. Forward and backward apart; results are compared first.

    python benchmarks/compare_scan.py --out benchmarks/results/h200

mamba-ssm's kernel takes equal lengths only, as [batch, channels, length]: its tensors are laid out so here, and it is
called as its autograd function calls it, through the compiled module selective_scan_cuda.
"""

import argparse
import importlib
import sys

import packseq
import torch
from report import environment, geometric_mean, write
from scan_cases import STATES, Case, scan_cases
from timing import time_cuda

_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
_TOLERANCE = {"bf16": 2e-2, "f32": 1e-3}  # ||a - b|| / ||b||; mamba-ssm's float32 kernel uses fast exp and log
_EXP2_RATE = 3.7e12  # of an H200: 132 multiprocessors, 16 a clock, 1.755 GHz
_WIDTH = 4  # of the convolution


def optional(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


class Scan:
    """One case's tensors, and the calls that are compared."""

    def __init__(self, case: Case):
        self.case, dtype = case, _DTYPES[case.dtype]
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape, dtype=torch.float32):
            return torch.randn(shape, device="cuda", generator=generator).to(dtype)

        rows = (case.total, case.channels)
        self.u, self.z, self.dout = (random(*rows, dtype=dtype) for _ in range(3))
        self.delta = (0.5 * random(*rows)).to(dtype)
        self.B, self.C = (random(case.total, 1, STATES, dtype=dtype) for _ in range(2))
        self.A = -torch.arange(1, STATES + 1, device="cuda").float().repeat(case.channels, 1)
        self.D, self.bias = random(case.channels), random(case.channels) - 4
        self.cu_seqlens = torch.tensor([0, *case.lengths], device="cuda").cumsum(0).int()
        self.leaves = [self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias]
        for x in self.leaves:
            x.requires_grad_()

    def ours(self) -> torch.Tensor:
        u, delta, A, B, C, D, z, bias = self.leaves
        return packseq.selective_scan(
            u, delta, A, B, C, self.cu_seqlens, D=D, z=z, delta_bias=bias, delta_softplus=True
        )

    def gradients(self, out: torch.Tensor):
        return torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """[total, channels] as a contiguous [batch, channels, length]."""
        return x.detach().unflatten(0, (len(self.case.lengths), -1)).transpose(1, 2).contiguous()

    def theirs(self, module) -> dict:
        u, delta, z, dout = map(self.batched, (self.u, self.delta, self.z, self.dout))
        B, C = (self.batched(x.detach()[:, 0])[:, None] for x in (self.B, self.C))
        A, D, bias = self.A.detach(), self.D.detach(), self.bias.detach()
        fixed = (u, delta, A, B, C, D, z, bias)
        out, x, out_z = module.fwd(*fixed, True)
        return {
            "out": out_z,
            "forward": lambda: module.fwd(*fixed, True),
            "backward": lambda: module.bwd(*fixed, dout, x, out, None, True, False),
        }


class Convolution:
    def __init__(self, case: Case):
        self.case, dtype = case, _DTYPES[case.dtype]
        generator = torch.Generator("cuda").manual_seed(0)
        self.x, self.dout = (
            torch.randn(case.total, case.channels, device="cuda", generator=generator).to(dtype) for _ in range(2)
        )
        self.weight = torch.randn(case.channels, _WIDTH, device="cuda", generator=generator)
        self.bias = torch.randn(case.channels, device="cuda", generator=generator)
        self.cu_seqlens = torch.tensor([0, *case.lengths], device="cuda").cumsum(0).int()
        self.leaves = [self.x, self.weight, self.bias]
        for x in self.leaves:
            x.requires_grad_()

    def ours(self) -> torch.Tensor:
        return packseq.causal_conv1d(self.x, self.weight, self.bias, self.cu_seqlens, activation="silu")

    def gradients(self, out: torch.Tensor):
        return torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)


def norm_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_scan(scan: Scan, theirs: dict) -> None:
    """Our output and gradients against mamba-ssm's."""
    out = scan.ours()
    du, ddelta, dA, dB, dC, dD, dbias, dz = theirs["backward"]()
    ours = dict(zip(("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias"), scan.gradients(out), strict=True))
    pairs = {
        "out": (scan.batched(out), theirs["out"]),
        **{n: (scan.batched(ours[n]), x) for n, x in (("du", du), ("ddelta", ddelta), ("dz", dz))},
        **{n: (scan.batched(ours[n][:, 0]), x[:, 0]) for n, x in (("dB", dB), ("dC", dC))},
        **{n: (ours[n], x) for n, x in (("dA", dA), ("dD", dD), ("dbias", dbias))},
    }
    for name, (a, b) in pairs.items():
        error, most = norm_error(a, b), _TOLERANCE[scan.case.dtype]
        if not error < most:  # NaN too
            sys.exit(f"{scan.case.name}: packseq's and mamba-ssm's {name} differ by {error:.2e}, allowed is {most}")


def time_scan(case: Case, mamba, seconds: float) -> list[dict]:
    scan = Scan(case)
    theirs = scan.theirs(mamba) if mamba and case.equal_lengths else None
    if theirs:
        check_scan(scan, theirs)
    out = scan.ours()

    def forward():
        with torch.no_grad():
            return scan.ours()

    calls = {"forward": {"packseq": forward}, "backward": {"packseq": lambda: scan.gradients(out)}}
    if theirs:
        for direction in calls:
            calls[direction]["mamba-ssm"] = theirs[direction]
    rows = []
    for direction, contestants in calls.items():
        ms = time_cuda(contestants, seconds)
        exp2 = case.steps / _EXP2_RATE * 1e3
        rows.append(
            {
                "case": f"scan {case.name}",
                "direction": direction,
                "packseq ms": ms["packseq"],
                "mamba-ssm ms": ms.get("mamba-ssm"),
                "over mamba-ssm": ms["mamba-ssm"] / ms["packseq"] if theirs else None,
                "over one exp2 a step": ms["packseq"] / exp2,
                "TB/s": case.bytes(direction == "backward") / ms["packseq"] * 1e-9,
            }
        )
    return rows


def time_convolution(case: Case, seconds: float) -> list[dict]:
    conv = Convolution(case)
    source = torch.empty(conv.x.numel() * conv.x.element_size(), dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    out = conv.ours()

    def forward():
        with torch.no_grad():
            return conv.ours()

    rows = []
    for direction, call, tensors in (("forward", forward, 2), ("backward", lambda: conv.gradients(out), 3)):
        ms = time_cuda({"packseq": call, "copy": lambda: copy.copy_(source)}, seconds)
        rate, floor = (n * source.numel() / t * 1e-9 for n, t in ((tensors, ms["packseq"]), (2, ms["copy"])))
        rows.append(
            {
                "case": f"conv {case.name}",
                "direction": direction,
                "packseq ms": ms["packseq"],
                "TB/s": rate,
                "copy TB/s": floor,
                "of copy": rate / floor,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only cases whose name holds one of these, comma-separated")
    parser.add_argument("--quick", action="store_true", help="a third of the samples")
    parser.add_argument("--out", help="folder for scan.json, scan.md, conv1d.json and conv1d.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    cases = [c for c in scan_cases() if any(word in c.name for word in options.rows.split(","))]
    if not cases:
        parser.error(f"--rows {options.rows!r} matches none of {[c.name for c in scan_cases()]}")
    if not torch.cuda.is_available():
        sys.exit("compare_scan.py compares on a GPU, and torch sees none")
    mamba = optional("selective_scan_cuda")
    if mamba is None:
        print("mamba-ssm's kernels (selective_scan_cuda) are not installed: packseq runs alone")

    seconds = 0.02 if options.quick else 0.06
    scans, convolutions = [], []
    for case in cases:
        for row in time_scan(case, mamba, seconds):
            scans.append(row)
            print(f"{row['case']:22} {row['direction']:9} {row['packseq ms']:.3f} ms", flush=True)
        convolutions += time_convolution(case, seconds)
    env = environment(options.commit)
    ratios = [row["over mamba-ssm"] for row in scans if row["over mamba-ssm"]]
    summary = []
    if ratios:
        summary = [f"{geometric_mean(ratios):.2f} of mamba-ssm's rate (geometric mean), at least {min(ratios):.2f}"]
    write(options.out, "scan", "Selective scan on the GPU, 16 states", env, scans, summary)
    write(options.out, "conv1d", "Causal convolution on the GPU, width 4, SiLU", env, convolutions, [])


if __name__ == "__main__":
    main()
