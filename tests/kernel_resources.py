"""Registers, stack and shared memory of every kernel, held against benchmarks/kernel_resources.tsv.

    python tests/kernel_resources.py            compare the installed library with the table
    python tests/kernel_resources.py --update   write the table anew

The numbers are the compiler's own, read out of the built library by cuobjdump. `stack` is local memory in bytes a
thread: spilled registers, and arrays that the compiler could not keep in registers. It must not grow. Registers and
static shared memory may change, and the changes are printed.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent.parent / "benchmarks" / "kernel_resources.tsv"
COLUMNS = "architecture\tkernel\tregisters\tstack\tshared"


class Resources(NamedTuple):
    registers: int
    stack: int
    shared: int


Table = dict[tuple[str, str], Resources]  # (architecture, kernel) -> its resources


def cuobjdump() -> str:
    """The one that pip installs, which reads what any CUDA up to its own version wrote, or the toolkit's."""
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = [*site.glob("cu*/bin/cuobjdump"), *filter(None, [shutil.which("cuobjdump")])]
    if not found:
        raise FileNotFoundError("cuobjdump was not found: pip install nvidia-cuda-cuobjdump")
    return str(found[0])


def without_parameters(name: str) -> str:
    """`f<A(int)>(B<C>, D)` -> `f<A(int)>`."""
    depth = 0
    for place in reversed(range(len(name))):
        depth += {")": 1, "(": -1}.get(name[place], 0)
        if depth == 0:
            return name[:place] if name.endswith(")") else name
    return name


def readable(names: list[str]) -> list[str]:
    """Demangled kernel names, without return type, parameters and namespaces that say nothing."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|packseq::|^void ", "", name) for name in text.splitlines()]
    return [re.sub(r"\((?:int|bool)\)", "", without_parameters(name)) for name in short]


def parse(report: str) -> Table:
    """The table from what `cuobjdump -res-usage` prints. Of kernels that share a name, the largest numbers."""
    keys, resources, architecture = [], [], ""
    for line in report.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            keys.append((architecture, match[1]))
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            resources.append(Resources(*map(int, match.groups())))
    table: Table = {}
    names = readable([name for _, name in keys])
    for (architecture, _), name, numbers in zip(keys, names, resources, strict=True):
        known = table.get((architecture, name), numbers)
        table[architecture, name] = Resources(*map(max, known, numbers))
    return table


def read(path: Path) -> tuple[str, Table]:
    """The CUDA version the table was written with, and the table."""
    cuda, _, *lines = path.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return cuda.removeprefix("# CUDA "), {(a, k): Resources(*map(int, numbers)) for a, k, *numbers in rows}


def write(path: Path, cuda: str, table: Table) -> None:
    lines = ["\t".join(map(str, (*key, *table[key]))) for key in sorted(table)]
    path.write_text("\n".join([f"# CUDA {cuda}", COLUMNS, *lines]) + "\n")


def compare(old: Table, new: Table) -> tuple[list[str], list[str]]:
    """Changes worth a look, and those that fail: a kernel that uses more stack than it had, or starts with some."""
    changes, failures = [], []
    for key in sorted(new):
        name, was, now = " ".join(key), old.get(key), new[key]
        if now.stack > (was.stack if was else 0):
            before = f"was {was.stack}" if was else "a new kernel"
            failures.append(f"{name}: {now.stack} bytes of stack ({before}), {now.registers} registers")
        elif was is None:
            changes.append(f"{name}: new, {now.registers} registers")
        elif was != now:
            pairs = zip(Resources._fields, was, now, strict=True)
            changes.append(f"{name}: " + ", ".join(f"{what} {a} -> {b}" for what, a, b in pairs if a != b))
    built = {architecture for architecture, _ in new}
    changes += [f"{' '.join(key)}: gone" for key in sorted(old.keys() - new.keys()) if key[0] in built]
    return changes, failures


def measure(library: Path) -> Table:
    command = [cuobjdump(), "-res-usage", str(library)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    import packseq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--library", type=Path, default=Path(packseq._C.__file__).parent / "libpackseq_ops.so")
    args = parser.parse_args()
    if not packseq._C.has_cuda:
        print("packseq was built without CUDA: there are no kernels to look at")
        return 1

    cuda, old = read(TABLE) if TABLE.exists() else (packseq._C.cuda, {})
    new = measure(args.library)
    changes, failures = compare(old, new)
    for line in changes:
        print(line)
    for line in failures:
        print(f"MORE STACK  {line}")
    if args.update:
        write(TABLE, packseq._C.cuda, new)
        print(f"{len(new)} kernels written to {TABLE.name}")
        return 0
    if cuda != packseq._C.cuda:
        print(f"the table is of CUDA {cuda}, this build of {packseq._C.cuda}: nothing to hold it against")
        return 0
    print(f"{len(new)} kernels: {len(changes)} changed, {len(failures)} with more stack than before")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
