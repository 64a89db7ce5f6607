"""packseq's attention against torch's own on one GPU, in one run: FlashAttention-2 (varlen_attn) on every case, cuDNN
(SDPA) where lengths are equal. Forward and backward apart, bfloat16, results compared before anything is timed.

    python benchmarks/compare_attention.py --out benchmarks/results/h200
"""

import argparse
import inspect
import sys

import packseq
import torch
from attention_cases import Case, attention_cases
from report import environment, geometric_mean, write
from timing import time_cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

_TOLERANCE = 2e-2  # ||a - b|| / ||b|| between two right bfloat16 results is about 5e-3
_OLD_VARLEN = "is_causal" in inspect.signature(varlen_attn).parameters  # torch 2.10


class Inputs:
    """One case's tensors: packed, and the same memory seen as [batch, heads, length, dim] where lengths are equal."""

    def __init__(self, case: Case):
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (case.total, case.heads, case.dim)
        q, k, v, self.dout = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)
        )
        self.qkv = [x.requires_grad_() for x in (q, k, v)]
        lengths = torch.tensor([0, *case.lengths], device="cuda")
        self.cu_seqlens = lengths.cumsum(0).to(torch.int32)
        self.longest = max(case.lengths)
        self.case = case

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (len(self.case.lengths), self.longest)).transpose(1, 2)


def ours(x: Inputs) -> torch.Tensor:
    return packseq.attention(*x.qkv, x.cu_seqlens, causal=x.case.causal)


def fa2(x: Inputs) -> torch.Tensor:
    mask = {"is_causal": x.case.causal} if _OLD_VARLEN else {"window_size": (-1, 0) if x.case.causal else (-1, -1)}
    return varlen_attn(*x.qkv, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest, **mask)


def cudnn(x: Inputs) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*map(x.batched, x.qkv), is_causal=x.case.causal)
    return out.transpose(1, 2).flatten(0, 1)


def contestants(x: Inputs) -> dict:
    found = {"packseq": ours, "FA2": fa2}
    if x.case.equal_lengths:
        try:
            cudnn(x)
            found["cuDNN"] = cudnn
        except RuntimeError as error:  # not on every GPU, nor in every build of torch
            print(f"{x.case.name}: without cuDNN, which says: {error}")
    return found


def check(case: Case, results: dict[str, tuple[torch.Tensor, ...]]) -> None:
    for which, a, b in zip(("out", "dq", "dk", "dv"), results["packseq"], results["FA2"], strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        if not error < _TOLERANCE:  # NaN too
            sys.exit(f"{case.name}: packseq's and FA2's {which} differ by {error:.2e}, allowed is {_TOLERANCE}")


def measure(case: Case, directions: list[str], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds by direction and contestant."""
    x = Inputs(case)
    found = contestants(x)
    outs = {name: call(x) for name, call in found.items()}

    def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, x.qkv, x.dout, retain_graph=True)

    check(case, {name: (outs[name], *gradients(outs[name])) for name in ("packseq", "FA2")})

    def forward(call):
        with torch.no_grad():
            return call(x)

    calls = {
        "forward": {name: lambda call=call: forward(call) for name, call in found.items()},
        "backward": {name: lambda out=out: gradients(out) for name, out in outs.items()},
    }
    return {direction: time_cuda(calls[direction], seconds) for direction in directions}


def report_row(case: Case, direction: str, times: dict[str, float]) -> dict:
    flops = case.flops(backward=direction == "backward")
    rates = {name: flops / ms * 1e-9 for name, ms in times.items()}
    return {
        "case": case.name,
        "direction": direction,
        "packseq ms": times["packseq"],
        **{f"{name} TFLOP/s": rates.get(name) for name in ("packseq", "FA2", "cuDNN")},
        "over FA2": rates["packseq"] / rates["FA2"],
        "over cuDNN": rates["packseq"] / rates["cuDNN"] if "cuDNN" in rates else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only cases whose name holds one of these, comma-separated")
    parser.add_argument("--directions", default="forward,backward", help="comma-separated (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a third of the samples")
    parser.add_argument("--out", help="folder for attention.json and attention.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()

    directions = options.directions.split(",")
    if not set(directions) <= {"forward", "backward"}:
        parser.error(f"--directions must be forward, backward or both, got {options.directions!r}")
    cases = [c for c in attention_cases("gpu") if any(word in c.name for word in options.rows.split(","))]
    if not cases:
        parser.error(f"--rows {options.rows!r} matches none of {[c.name for c in attention_cases('gpu')]}")
    if not torch.cuda.is_available():
        sys.exit("compare_attention.py compares on a GPU, and torch sees none; compare_attention_cpu.py is for the CPU")

    rows = []
    for case in cases:
        for direction, times in measure(case, directions, 0.02 if options.quick else 0.06).items():
            rows.append(report_row(case, direction, times))
            row = rows[-1]
            rate, ratio = row["packseq TFLOP/s"], row["over FA2"]
            print(f"{case.name:24} {direction:9} {rate:6.0f} TFLOP/s  {ratio:.2f} of FA2", flush=True)
    summary = []
    for direction in directions:
        ratios = [row["over FA2"] for row in rows if row["direction"] == direction]
        mean, least = geometric_mean(ratios), min(ratios)
        summary.append(f"{direction}: {mean:.3f} of FA2's rate (geometric mean), at least {least:.3f}  ")
    title = "Attention on the GPU: packseq, FlashAttention-2, cuDNN; bfloat16"
    write(options.out, "attention", title, environment(options.commit), rows, summary)


if __name__ == "__main__":
    main()
