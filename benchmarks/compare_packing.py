"""packseq's pack and unpack against what is done in torch today, in one run, on the GPU or the CPU.

- pack: `unpad` is mask.sum, cumsum, nonzero and a gather, which gives the same three results; `gather` is the last step
  alone, an index_select with indices that are already there.
- unpack: `scatter` is zeros and an index_copy.
- copy: a copy that moves as many bytes, the floor.

    python benchmarks/compare_packing.py --out benchmarks/results/h200
"""

import argparse
import sys

import packseq
import torch
from packing_cases import Case, packing_cases
from report import environment, geometric_mean, write
from timing import time_cpu, time_cuda


class Inputs:
    def __init__(self, case: Case, device: str):
        self.case = case
        lengths = torch.tensor(case.lengths, device=device)
        self.count = sum(case.lengths)
        self.mask = torch.arange(case.length, device=device) < lengths[:, None]
        shape = (case.batch, case.length)
        if case.row_bytes == 8:  # token ids
            self.padded = torch.randint(30_000, shape, device=device)
        else:
            self.padded = torch.randn(*shape, case.row_bytes // 2, device=device, dtype=torch.bfloat16)
        self.tokens, self.cu_seqlens, self.indices = packseq.pack(self.padded, self.mask, capacity=self.count)

    def copy(self, pack: bool):
        source = self.padded.new_empty(int(self.case.bytes(pack)) // 2, dtype=torch.int8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)


def unpad(x: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cu_seqlens = torch.nn.functional.pad(x.mask.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
    indices = x.mask.flatten().nonzero().flatten()
    return x.padded.flatten(0, 1).index_select(0, indices), cu_seqlens, indices


def scatter(x: Inputs) -> torch.Tensor:
    rows = x.tokens.new_zeros(x.case.batch * x.case.length, *x.tokens.shape[1:])
    return rows.index_copy_(0, x.indices, x.tokens).view_as(x.padded)


def check(name: str, ours, peers) -> None:
    if not all(torch.equal(a, b) for a, b in zip(ours, peers, strict=True)):
        sys.exit(f"{name}: packseq's results differ from torch's")


def compare(case: Case, device: str, seconds: float) -> list[dict]:
    x = Inputs(case, device)
    place = (x.indices, case.batch, case.length)
    check(f"pack {case.name}", (x.tokens, x.cu_seqlens, x.indices), unpad(x))
    check(f"unpack {case.name}", [packseq.unpack(x.tokens, *place)], [scatter(x)])
    rows_of_batch = x.padded.flatten(0, 1)
    calls = {
        "pack": {
            "packseq": lambda: packseq.pack(x.padded, x.mask, capacity=x.count),
            "unpad": lambda: unpad(x),
            "gather": lambda: rows_of_batch.index_select(0, x.indices),
            "copy": x.copy(True),
        },
        "unpack": {
            "packseq": lambda: packseq.unpack(x.tokens, *place),
            "scatter": lambda: scatter(x),
            "copy": x.copy(False),
        },
    }
    rows = []
    for direction, contestants in calls.items():
        times = (time_cuda if device == "cuda" else time_cpu)(contestants, seconds)
        rates = {name: case.bytes(direction == "pack") / ms * 1e-6 for name, ms in times.items()}
        peer = "unpad" if direction == "pack" else "scatter"
        row = {"case": case.name, "direction": direction, "packseq ms": times["packseq"]}
        row |= {f"{name} GB/s": rates.get(name) for name in ("packseq", "unpad", "gather", "scatter", "copy")}
        row |= {"over torch": rates["packseq"] / rates[peer], "of copy": rates["packseq"] / rates["copy"]}
        rows.append(row)
        rate, ratio = rates["packseq"], row["over torch"]
        print(f"{direction:6} {case.name:8} {rate:8.1f} GB/s  {ratio:.2f} of torch's", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    parser.add_argument("--out", help="folder for packing_DEVICE.json and packing_DEVICE.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    seconds = 0.05 if device == "cuda" else 0.5
    rows = []
    for case in packing_cases():
        rows += compare(case, device, seconds / 5 if options.quick else seconds)
    summary = [f"{geometric_mean([row['over torch'] for row in rows]):.2f} of torch's rate (geometric mean)"]
    title = f"Packing and unpacking on the {device.upper().replace('CUDA', 'GPU')}: packseq and torch"
    write(options.out, f"packing_{device}", title, environment(options.commit), rows, summary)


if __name__ == "__main__":
    main()
