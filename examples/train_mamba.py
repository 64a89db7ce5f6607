"""Trains a byte-level Mamba language model on the functions of the Python standard library, and lets it write some.

Documents of 15 to thousands of bytes are packed one after another: no token is padding, and no document sees another.
The same batches right-padded, through the same model, show what that is worth. Ctrl-C keeps a checkpoint; --resume goes
on from it, and ends with the same bits as a run that was never stopped (on the same machine, with as many threads).
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from packseq.nn import MambaConfig, MambaLM
from search_report import progress
from source_code import functions
from torch import Tensor
from training import Run, add_by_device, name_of, require, resume_from, run_parser, settle, train
from training_report import save_plot

END = 0  # the byte that stands before a document, and after it: no text has it
PROMPTS = [b"def ", b"def __init__(self, ", b"@property\ndef name(self):\n", b"async def "]
LIMIT = 1e-3  # of the difference between the losses packed and padded, in bits
TURNS = 5


@dataclass
class Batch:
    """Documents one after another: bytes, those that follow them, and the boundaries."""

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, documents: list[bytes], device: torch.device) -> "Batch":
        before = torch.frombuffer(bytearray(b"".join(b"\0" + text for text in documents)), dtype=torch.uint8)
        after = torch.frombuffer(bytearray(b"".join(text + b"\0" for text in documents)), dtype=torch.uint8)
        lengths = torch.tensor([0, *(len(text) + 1 for text in documents)])
        return cls(before.long().to(device), after.long().to(device), lengths.cumsum(0).int().to(device))

    def padded(self) -> "Batch":
        """Every document as long as the longest, by padding after it, which has no target."""
        lengths = self.cu_seqlens.diff().tolist()
        longest = max(lengths)

        def pad(rows: Tensor, value: int) -> Tensor:
            return torch.cat([F.pad(x, (0, longest - len(x)), value=value) for x in rows.split(lengths)])

        boundaries = torch.arange(len(lengths) + 1, dtype=torch.int32, device=self.ids.device) * longest
        return Batch(pad(self.ids, END), pad(self.targets, -100), boundaries)


@dataclass
class Stream:
    """Batches of whole documents up to a budget of tokens, in an order that each epoch draws anew from the seed."""

    documents: list[bytes]
    budget: int
    seed: int
    device: torch.device
    epoch: int = 0
    place: int = 0  # in the epoch's order; together with it, all there is to resume from
    order: list[int] = field(default_factory=list)

    def next(self) -> Batch:
        if not self.order:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            self.order = torch.randperm(len(self.documents), generator=generator).tolist()
        chosen, tokens = [], 0
        while self.place < len(self.order):
            document = self.documents[self.order[self.place]]
            tokens += len(document) + 1
            if tokens > self.budget and chosen:
                break
            chosen.append(document)
            self.place += 1
        if self.place == len(self.order):
            self.epoch, self.place, self.order = self.epoch + 1, 0, []
        return Batch.of(chosen, self.device)


class Trainer(Run):
    """A run on a stream of documents, whose place goes into the checkpoint too."""

    shaping = ("steps", "batch_tokens", "longest", "d_model", "layers", "learning_rate", "seed")

    def __init__(self, training: list[bytes], options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        config = MambaConfig(vocab_size=256, hidden_size=options.d_model, num_hidden_layers=options.layers)
        model = MambaLM(config).to(options.device)
        # Norms, biases and the scan's own parameters do not decay.
        decays = [p for p in model.parameters() if p.dim() > 1 and not hasattr(p, "_no_weight_decay")]
        others = [p for p in model.parameters() if p.dim() <= 1 or hasattr(p, "_no_weight_decay")]
        groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        super().__init__(model, torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95)), options)
        self.stream = Stream(training, options.batch_tokens, options.seed, self.device)

    def loss(self, batch: Batch) -> Tensor:
        """In bits a byte. On a GPU matrix products are in bfloat16."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(batch.ids, batch.cu_seqlens)
        return F.cross_entropy(logits.float(), batch.targets) / math.log(2)

    def advance(self) -> int:
        batch = self.stream.next()
        self.descend(self.loss(batch))
        return len(batch.ids)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> None:
        bits = sum(self.loss(batch).item() * len(batch.ids) for batch in batches)
        self.held_out.append((self.step, bits / sum(len(batch.ids) for batch in batches)))

    def state(self) -> dict[str, object]:
        return super().state() | {"stream": (self.stream.epoch, self.stream.place)}

    def restore(self, file: Path) -> dict[str, object]:
        state = super().restore(file)
        self.stream.epoch, self.stream.place = state["stream"]
        return state


def pieces(documents: list[bytes], longest: int) -> list[bytes]:
    """Documents of at most ``longest`` tokens: what is longer is cut."""
    size = longest - 1
    return [text[i : i + size] for text in documents for i in range(0, len(text), size)]


def bits_a_byte(trainer: Trainer) -> str:
    recent = trainer.losses[-20:]
    return f"{sum(recent) / len(recent):5.2f} bits a byte"


def compare(trainer: Trainer, batches: list[Batch]) -> bool:
    """Prints the speed of training steps packed and padded, by real tokens; whether their losses agree."""
    ways = {"padded": [batch.padded() for batch in batches], "packed": batches}
    seconds, losses = dict.fromkeys(ways, 0.0), {way: [] for way in ways}

    def run(batch: Batch) -> float:
        loss = trainer.loss(batch)
        loss.backward()
        return loss.item()  # waits for a GPU

    for way in ways.values():  # warm up
        run(way[0])
    turns = [(i, way) for i in range(len(batches)) for way in ways]  # in turns, so that noise hits both
    for i, way in progress(turns, "packed and padded", len(turns)):
        start = time.perf_counter()
        losses[way].append(run(ways[way][i]))
        seconds[way] += time.perf_counter() - start
    trainer.optimizer.zero_grad()
    tokens = sum(len(batch.ids) for batch in batches)
    print(f"\nThe same documents, {tokens:,} tokens, forward and backward:")
    print(f"  {'':8} {'rows':>10} {'seconds':>9} {'tokens/s':>11} {'ratio':>7}")
    for way, its in ways.items():
        rows, ratio = sum(len(batch.ids) for batch in its), seconds["padded"] / seconds[way]
        print(f"  {way:8} {rows:10,} {seconds[way]:9.2f} {tokens / seconds[way]:11,.0f} {ratio:6.2f}x")
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    limit = LIMIT if trainer.device.type == "cpu" else 20 * LIMIT  # bfloat16
    verdict = "at most" if worst <= limit else "TOO MUCH: must be at most"
    print(f"  largest difference between their losses: {worst:.1e} bits ({verdict} {limit:.0e})")
    return worst <= limit  # NaN is not


def write(trainer: Trainer, length: int) -> Iterator[str]:
    """What the model makes of each prompt, all of them at once."""
    prompts = [torch.tensor([END, *prompt], device=trainer.device) for prompt in PROMPTS]
    generator = torch.Generator(trainer.device).manual_seed(trainer.options.seed)
    options = {"temperature": 0.7, "top_k": 40, "stop_token": END, "generator": generator}
    for prompt, added in zip(PROMPTS, trainer.model.generate(prompts, length, **options), strict=True):
        text = prompt + bytes(added.tolist())
        yield text.rstrip(b"\0").decode(errors="replace")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = run_parser(__doc__, "demo/train_mamba")
    add_by_device(parser, "--batch-tokens", 4096, 65536, "at most so many in a batch")
    parser.add_argument("--longest", type=int, default=2048, metavar="N", help="documents are cut there (%(default)s)")
    add_by_device(parser, "--d-model", 128, 512, "width of the model")
    add_by_device(parser, "--layers", 4, 12, "of the model")
    add_by_device(parser, "--learning-rate", 4e-3, 1e-3, "its peak")
    parser.add_argument("--sample", type=int, default=300, metavar="N", help="bytes to generate (%(default)s)")
    options = settle(parser, arguments)
    require(parser, options, longest=2, batch_tokens=options.longest, d_model=1, layers=1)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    resumed, where = resume_from(options), name_of(options.device)
    print("Reading the functions of the standard library", flush=True)
    documents = pieces(functions(), options.longest)
    held_out, training = documents[::50], [x for i, x in enumerate(documents) if i % 50]
    lengths = sorted(map(len, documents))
    print(
        f"{len(documents):,} documents, {sum(lengths):,} bytes; half of them have at most {lengths[len(lengths) // 2]}"
    )

    trainer = Trainer(training, options)
    if resumed:
        trainer.restore(resumed)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{count:,} parameters, {options.layers} layers of {options.d_model}, on {where}; from step {trainer.step}")
    test = Stream(held_out, options.batch_tokens, options.seed, options.device)
    test_batches = [test.next() for _ in range(4)]
    uninterrupted = train(trainer, lambda: trainer.evaluate(test_batches), lambda: bits_a_byte(trainer))
    if trainer.step < options.steps:
        print(f"\nStopped after {trainer.step} steps; the same command with --resume goes on from there.")
    for step, bits in trainer.held_out:
        print(f"  step {step:6,}: {bits:.3f} bits a byte on documents that it is not trained on")
    plot = options.folder / "loss.png"
    title = f"MambaLM of {count:,} parameters on {where}"
    save_plot(plot, trainer.losses, trainer.held_out, title, "bits a byte", 8.2)
    print(f"Loss curve: {plot}\nCheckpoint: {options.folder / 'checkpoint.pt'}")
    if trainer.step < options.steps:
        return 0 if uninterrupted else 130
    other = Stream(training, options.batch_tokens, options.seed + 1, options.device)
    agree = compare(trainer, [other.next() for _ in range(TURNS)])
    for text in write(trainer, options.sample) if options.sample else ():
        print(f"\n{'-' * 40}\n{text}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
