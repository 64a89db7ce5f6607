"""packseq's long convolution on the CPU against torch.fft, on equal lengths and, padded to the longest, on ragged ones.

python benchmarks/compare_longconv_cpu.py --out benchmarks/results/epyc-2-cores
"""

import argparse
import sys

import packseq
import torch
from report import environment, geometric_mean, write
from timing import time_cpu
from torch import Tensor

CHANNELS = 64
CASES = {
    "64 x 256": [256] * 64,
    "16 x 1024": [1024] * 16,
    "4 x 4096": [4096] * 4,
    "1 x 16384": [16384],
    "ragged, 16 to 8192": [8192 >> i // 2 for i in range(19)],
}


class Case:
    """The tensors of one batch, packed and padded as torch.fft takes them, ``[batch, channels, length]``."""

    def __init__(self, lengths: list[int]):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.lengths, self.longest = lengths, max(lengths)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        self.u, self.dout = random(sum(lengths), CHANNELS).requires_grad_(), random(sum(lengths), CHANNELS)
        self.k = (random(CHANNELS, self.longest) * torch.exp(-torch.arange(self.longest) / 500)).requires_grad_()
        self.padded, self.padded_dout = self.pad(self.u.detach()).requires_grad_(), self.pad(self.dout)

    def pad(self, x: Tensor) -> Tensor:
        padded = torch.zeros(len(self.lengths), CHANNELS, self.longest)
        for row, part in zip(padded, x.split(self.lengths), strict=True):
            row[:, : len(part)] = part.T
        return padded

    def ours(self) -> Tensor:
        return packseq.long_conv(self.u, self.k, self.cu_seqlens)

    def theirs(self) -> Tensor:
        n = 2 * self.longest
        return torch.fft.irfft(torch.fft.rfft(self.padded, n) * torch.fft.rfft(self.k, n), n)[..., : self.longest]


def check(name: str, x: Tensor, y: Tensor) -> None:
    if not (x - y).norm() <= 1e-5 * y.norm():
        sys.exit(f"{name} differs from torch's")


def compare(name: str, case: Case, seconds: float) -> list[dict]:
    ours, theirs = case.ours(), case.theirs()
    packed = torch.cat([row[:, :n].T for row, n in zip(theirs, case.lengths, strict=True)])
    check(f"{name}: out", ours, packed)

    def backward(out: Tensor, u: Tensor, dout: Tensor):
        return lambda: torch.autograd.grad(out, (u, case.k), dout, retain_graph=True)

    grads = backward(ours, case.u, case.dout), backward(theirs, case.padded, case.padded_dout)
    check(f"{name}: dk", grads[0]()[1], grads[1]()[1])
    rows = []
    for direction, calls in {"forward": (case.ours, case.theirs), "backward": grads}.items():
        with torch.set_grad_enabled(direction == "backward"):
            ms = time_cpu(dict(zip(("packseq", "torch.fft"), calls, strict=True)), seconds)
        row = {"case": name, "direction": direction} | {f"{who} ms": x for who, x in ms.items()}
        rows.append(row | {"over torch.fft": ms["torch.fft"] / ms["packseq"]})
        print(f"{name:20} {direction:8} {rows[-1]['over torch.fft']:.2f} of torch.fft's rate", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="for each contestant (%(default)s)")
    parser.add_argument("--out", help="folder for longconv_cpu.json and longconv_cpu.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    rows = [row for name, lengths in CASES.items() for row in compare(name, Case(lengths), options.seconds)]
    summary = [f"{geometric_mean([row['over torch.fft'] for row in rows]):.2f} of torch.fft's rate (geometric mean)"]
    title = f"The long convolution on the CPU, float32, {CHANNELS} channels: packseq and torch.fft"
    write(options.out, "longconv_cpu", title, environment(options.commit), rows, summary)


if __name__ == "__main__":
    main()
