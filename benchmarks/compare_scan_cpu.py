"""packseq's selective scan on the CPU against the same recurrence as a loop in torch, plain and compiled, in one run.

    python benchmarks/compare_scan_cpu.py --out benchmarks/results/cpu

The compiled loop is compiled a block of tokens at a time, as a whole sequence would take the compiler minutes; of the
block lengths tried the fastest counts. Forward alone, since a loop's backward keeps a state for every token.
"""

import argparse
import sys

import packseq
import torch
from report import environment, write
from timing import time_cpu
from torch import Tensor
from torch.nn.functional import silu, softplus

_BATCH, _CHANNELS, _LENGTH, _STATES = 2, 512, 1024, 16
_BLOCKS = (1, 8, 32)  # tokens compiled together


def walk(state: Tensor, u: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, tokens, channels] of u and the steps d; the last state and y."""
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(d[:, t, :, None] * A)
        state = decay * state + (d[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return state, torch.stack(outputs, 1)


def loop(step, block: int, u, delta, A, B, C, D, z, bias) -> Tensor:
    d = softplus(delta + bias)
    state, outputs = u.new_zeros(_BATCH, _CHANNELS, _STATES), []
    for begin in range(0, _LENGTH, block):
        part = slice(begin, begin + block)
        state, y = step(state, u[:, part], d[:, part], A, B[:, part], C[:, part])
        outputs.append(y)
    return (torch.cat(outputs, 1) + D * u) * silu(z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of torch's pool, which packseq uses too")
    parser.add_argument("--out", help="folder for scan_cpu.json and scan_cpu.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    torch.manual_seed(0)
    u, delta, z = (torch.randn(_BATCH, _LENGTH, _CHANNELS) for _ in range(3))
    B, C = (torch.randn(_BATCH, _LENGTH, _STATES) for _ in range(2))
    A = -torch.arange(1, _STATES + 1).float().repeat(_CHANNELS, 1)
    D, bias = torch.randn(_CHANNELS), torch.randn(_CHANNELS) - 4
    cu_seqlens = torch.arange(_BATCH + 1, dtype=torch.int32) * _LENGTH

    def ours() -> Tensor:
        rows = [x.flatten(0, 1) for x in (u, delta)]
        matrices = [x.flatten(0, 1)[:, None] for x in (B, C)]
        return packseq.selective_scan(
            *rows, A, *matrices, cu_seqlens, D=D, z=z.flatten(0, 1), delta_bias=bias, delta_softplus=True
        )

    calls = {"packseq": ours, "plain loop": lambda: loop(walk, _LENGTH, u, delta, A, B, C, D, z, bias)}
    for block in _BLOCKS:
        step = torch.compile(walk, dynamic=False)
        calls[f"loop compiled by {block}"] = lambda step=step, block=block: loop(
            step, block, u, delta, A, B, C, D, z, bias
        )
    with torch.no_grad():
        exact = ours().view_as(u)
        for name, call in calls.items():
            error = (call().view_as(u) - exact).norm() / exact.norm()
            if not error < 1e-5:
                sys.exit(f"{name} differs by {error:.2e}")
        times = time_cpu(calls, 3.0)
    rows = [{"what": name, "ms": ms, "over packseq": ms / times["packseq"]} for name, ms in times.items()]
    for row in rows:
        print(f"{row['what']:20} {row['ms']:9.2f} ms {row['over packseq']:7.1f} times packseq's")
    title = f"Selective scan on the CPU, forward, B{_BATCH} D{_CHANNELS} L{_LENGTH} N{_STATES}, float32"
    write(options.out, "scan_cpu", title, environment(options.commit), rows, [])


if __name__ == "__main__":
    main()
