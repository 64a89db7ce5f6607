"""packseq's attention against torch's SDPA on the CPU, in one run. Equal lengths meet SDPA without padding; ragged ones
meet it padded to the longest, with a key mask where the causal mask does not already hide the padding.

    python benchmarks/compare_attention_cpu.py --out benchmarks/results/cpu
"""

import argparse
import sys

import packseq
import torch
from attention_cases import Case, attention_cases
from report import environment, write
from timing import time_cpu

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # ||a - b|| / ||b||


class Inputs:
    """One case's tensors, packed and padded."""

    def __init__(self, case: Case, dtype: torch.dtype):
        torch.manual_seed(0)
        shape = (case.total, case.heads, case.dim)
        lengths = torch.tensor(case.lengths)
        self.case = case
        self.cu_seqlens = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
        self.real = torch.arange(max(case.lengths)) < lengths[:, None]
        *qkv, self.dout = (torch.randn(shape).to(dtype) for _ in range(4))
        self.packed = [x.requires_grad_() for x in qkv]
        self.padded = [self.pad(x.detach()).requires_grad_() for x in qkv]
        self.padded_dout = self.pad(self.dout)
        no_key_mask = case.equal_lengths or case.causal
        self.key_mask = None if no_key_mask else self.real[:, None, None, :].contiguous()

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        full = x.new_zeros(*self.real.shape, *x.shape[1:])
        full[self.real] = x
        return full.transpose(1, 2).contiguous()  # [batch, heads, length, dim]

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)[self.real]


def ours(x: Inputs) -> torch.Tensor:
    return packseq.attention(*x.packed, x.cu_seqlens, causal=x.case.causal)


def sdpa(x: Inputs) -> torch.Tensor:
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(*x.padded, attn_mask=x.key_mask, is_causal=x.case.causal)


def without_gradients(call, x: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return call(x)


def compare(case: Case, dtype: torch.dtype, seconds: float) -> list[dict]:
    x = Inputs(case, dtype)
    out, peer = ours(x), sdpa(x)

    def our_gradients():
        return torch.autograd.grad(out, x.packed, x.dout, retain_graph=True)

    def peer_gradients():
        return torch.autograd.grad(peer, x.padded, x.padded_dout, retain_graph=True)

    pairs = zip((out, *our_gradients()), (peer, *peer_gradients()), ("out", "dq", "dk", "dv"), strict=True)
    for a, b, which in pairs:
        b = x.unpad(b).double()
        error = (a.double() - b).norm() / b.norm()
        if not error < _TOLERANCE[dtype]:  # NaN too
            sys.exit(f"{case.name}: packseq's and SDPA's {which} differ by {error:.2e}, allowed {_TOLERANCE[dtype]}")

    calls = {
        "forward": {"packseq": lambda: without_gradients(ours, x), "SDPA": lambda: without_gradients(sdpa, x)},
        "backward": {"packseq": our_gradients, "SDPA": peer_gradients},
    }
    rows = []
    for direction, pair in calls.items():
        times = time_cpu(pair, seconds)
        rows.append(
            {
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "direction": direction,
                "packseq ms": times["packseq"],
                "SDPA ms": times["SDPA"],
                "packseq GFLOP/s": case.flops(direction == "backward") / times["packseq"] * 1e-6,
                "SDPA over packseq": times["SDPA"] / times["packseq"],
                "padding": 1 - case.total / x.real.numel(),
            }
        )
        print(
            f"{case.name:24} {rows[-1]['dtype']:9} {direction:9} {rows[-1]['SDPA over packseq']:.2f} times SDPA's speed"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only cases whose name holds one of these, comma-separated")
    parser.add_argument("--threads", type=int, help="of torch's pool, which packseq uses too")
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    parser.add_argument("--out", help="folder for attention_cpu.json and attention_cpu.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [c for c in attention_cases("cpu") if any(word in c.name for word in options.rows.split(","))]
    if not cases:
        parser.error(f"--rows {options.rows!r} matches none of {[c.name for c in attention_cases('cpu')]}")

    rows = []
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            rows += compare(case, dtype, 0.2 if options.quick else 1.0)
    title = "Attention on the CPU: packseq and torch's SDPA, padded where lengths differ"
    write(options.out, "attention_cpu", title, environment(options.commit), rows, [])


if __name__ == "__main__":
    main()
