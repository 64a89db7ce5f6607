"""The parts of the examples that make runs: their texts, pictures and batches, that padded and packed are the same
model, and that training goes on from a checkpoint as if it had not stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from packseq.nn import BertConfig, BertEncoder, mean_pool

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def texts():
    for name in ("tokenizers", "numpy", "matplotlib"):
        pytest.importorskip(name)
    from semantic_search import Texts

    generator = torch.Generator().manual_seed(0)
    lengths = [5, 17, 1, 30, 30, 2, 64, 9]
    return Texts([torch.randint(0, 50, (n,), generator=generator).tolist() for n in lengths], torch.device("cpu"))


def test_docstrings_are_many_and_come_once_and_in_the_same_order():
    from docstrings import standard_library

    found = standard_library()
    assert len(found) > 3000
    assert len({d.text for d in found}) == len(found)
    assert {"gzip.compress", "random.Random.shuffle"} <= {d.name for d in found}
    assert not any(d.name.startswith(("test.", "site-packages.")) for d in found)
    assert all(d.first_line for d in found)
    assert standard_library() == found


@pytest.mark.parametrize("budget", [64, 70, 1000])
def test_packed_batches_hold_all_texts_within_the_budget(texts, budget):
    batches = texts.packed(budget)
    assert torch.equal(torch.cat([ids for ids, _ in batches]), texts.ids)
    assert [n for _, cu_seqlens in batches for n in cu_seqlens.diff().tolist()] == texts.lengths
    for ids, cu_seqlens in batches:
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == len(ids) <= budget


@torch.inference_mode()
def test_padded_and_packed_are_the_same_model(texts):
    from padded_bert import mean_embeddings

    torch.manual_seed(0)
    encoder = BertEncoder(BertConfig(50, 64, 2, 4, 128, max_position_embeddings=64, initializer_range=0.3)).eval()
    order = list(range(len(texts.lengths)))
    padded = torch.cat([mean_embeddings(encoder, *batch) for batch in texts.padded(3, order)])
    packed = [mean_pool(encoder(ids, cu_seqlens), cu_seqlens) for ids, cu_seqlens in texts.packed(70)]
    torch.testing.assert_close(torch.cat(packed), padded, rtol=0, atol=1e-5)
    one = texts.padded(1, order)[3]
    assert one[1] is None  # nothing is padded, so there is no mask
    torch.testing.assert_close(mean_embeddings(encoder, *one)[0], padded[3], rtol=0, atol=1e-5)


# ---- make train-mamba


def test_functions_are_many_and_come_once():
    from source_code import functions

    found = functions()
    assert len(found) > 3000
    assert len(set(found)) == len(found)
    assert all(text.startswith((b"def ", b"async def ", b"@")) and b"\0" not in text for text in found)
    assert any(text.startswith(b"def copyfile(src, dst") for text in found)


@pytest.fixture
def training(monkeypatch):
    """train_mamba, with documents that are quick to read."""
    for name in ("numpy", "matplotlib"):
        pytest.importorskip(name)
    import train_mamba

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (150,), generator=generator).tolist()
    documents = [bytes(torch.randint(97, 123, (n,), generator=generator).tolist()) for n in lengths]
    monkeypatch.setattr(train_mamba, "functions", lambda: documents)
    monkeypatch.setattr(train_mamba, "TURNS", 1)
    return train_mamba


def test_batches_hold_each_document_once_an_epoch(training):
    documents = training.functions()
    stream = training.Stream(documents, 300, 0, torch.device("cpu"))
    for epoch in range(2):
        seen = []
        while stream.epoch == epoch:
            batch = stream.next()
            assert len(batch.ids) <= 300
            lengths = batch.cu_seqlens.diff().tolist()
            for ids, targets in zip(batch.ids.split(lengths), batch.targets.split(lengths), strict=True):
                assert ids[0] == targets[-1] == training.END
                assert torch.equal(ids[1:], targets[:-1])
                seen.append(bytes(ids[1:].tolist()))
        assert seen != documents
        assert sorted(seen) == sorted(documents)
    cut = training.pieces(documents, 10)
    assert b"".join(cut) == b"".join(documents)
    assert max(map(len, cut)) == 9


def tiny(folder: Path, *more: str) -> list[str]:
    sizes = "--steps 6 --batch-tokens 400 --longest 60 --d-model 32 --layers 2 --save-every 2 --sample 5 --device cpu"
    return [*sizes.split(), "--folder", str(folder), *more]


def test_training_resumes_with_the_same_bits(training, tmp_path, capsys):
    at_once, in_parts = tmp_path / "at once", tmp_path / "in parts"
    assert training.main(tiny(at_once)) == 0
    out = capsys.readouterr().out
    assert "bits a byte" in out
    assert "at most 1e-03" in out
    assert "async def" in out
    assert (at_once / "loss.png").stat().st_size > 1000
    assert training.main(tiny(in_parts, "--stop-at", "3")) == 0
    assert training.main(tiny(in_parts, "--resume", "--stop-at", "4")) == 0
    assert training.main(tiny(in_parts, "--resume")) == 0
    assert_same_checkpoints(at_once, in_parts)


def assert_same_checkpoints(at_once: Path, in_parts: Path, steps: int = 6) -> None:
    whole, parts = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (at_once, in_parts))
    assert len(whole["losses"]) == steps
    assert whole.keys() == parts.keys()
    for name in whole.keys() - {"model", "optimizer"}:
        assert whole[name] == parts[name]
    for name, x in whole["model"].items():
        assert_same_bits(name, parts["model"][name], x)
    for i, moments in whole["optimizer"]["state"].items():
        for name, x in moments.items():
            assert_same_bits(f"{name} of {i}", parts["optimizer"]["state"][i][name], x)


def test_interrupted_training_keeps_whole_steps(training, tmp_path, monkeypatch, capsys):
    advance = training.Trainer.advance

    def interrupted(self) -> int:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(training.Trainer, "advance", interrupted)
    assert training.main(tiny(tmp_path)) == 130
    assert "Stopped after 3 steps; the same command with --resume" in capsys.readouterr().out
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 3


def test_resuming_otherwise_is_refused(training, tmp_path):
    with pytest.raises(SystemExit, match=r"There is no .*checkpoint.pt to resume from"):
        training.main(tiny(tmp_path, "--resume"))
    assert training.main(tiny(tmp_path, "--stop-at", "1")) == 0
    with pytest.raises(SystemExit, match="was trained with --seed 0: resume with the same, not 3"):
        training.main(tiny(tmp_path, "--resume", "--seed", "3"))


def test_padded_and_packed_documents_have_the_same_loss(training):
    options = training.parse(tiny(Path("unused")))
    trainer = training.Trainer(training.functions(), options)
    batch = trainer.stream.next()
    padded = batch.padded()
    assert len(padded.ids) > len(batch.ids)
    torch.testing.assert_close(trainer.loss(padded), trainer.loss(batch), rtol=0, atol=1e-5)


# ---- make train-s4


def test_pictures_are_ragged_and_the_same_for_a_seed():
    from shapes import CLASSES, LONGEST, SIDES, draw

    pictures, again = draw(40, 5), draw(40, 5)
    assert torch.equal(pictures.pixels, again.pixels)
    assert not torch.equal(pictures.pixels[:1000], draw(40, 6).pixels[:1000])
    lengths = pictures.cu_seqlens.diff()
    assert (pictures.cu_seqlens[0], pictures.cu_seqlens[-1]) == (0, len(pictures.pixels))
    assert SIDES[0] ** 2 <= lengths.min() < lengths.max() <= LONGEST
    assert set(pictures.classes.tolist()) == set(range(len(CLASSES)))
    for pixels in pictures.pixels.split(lengths.tolist()):
        assert 30 < (pixels > 0.5).sum() < 500  # there is a line, and it is no more than that


@pytest.fixture
def pixels():
    for name in ("numpy", "matplotlib"):
        pytest.importorskip(name)
    import train_s4

    return train_s4


def tiny_pixels(folder: Path, *more: str) -> list[str]:
    sizes = "--steps 4 --pictures 3 --d-model 4 --layers 1 --save-every 2 --tests 5 --device cpu"
    return [*sizes.split(), "--folder", str(folder), *more]


@pytest.mark.parametrize("layer", ["s4", "s4d", "h3"])
def test_pixels_resume_with_the_same_bits(pixels, tmp_path, capsys, layer):
    at_once, in_parts = tmp_path / "at once", tmp_path / "in parts"
    assert pixels.main(tiny_pixels(at_once, "--layer", layer)) == 0
    assert "of 5 new pictures right" in capsys.readouterr().out
    assert (at_once / "accuracy.png").stat().st_size > 1000
    assert pixels.main(tiny_pixels(in_parts, "--layer", layer, "--stop-at", "1")) == 0
    assert "Stopped after 1 steps; the same command with --resume" in capsys.readouterr().out
    assert pixels.main(tiny_pixels(in_parts, "--layer", layer, "--resume")) == 0
    assert_same_checkpoints(at_once, in_parts, steps=4)


def test_pixels_refuse_what_does_not_fit(pixels, tmp_path):
    with pytest.raises(SystemExit, match=r"There is no .*checkpoint.pt to resume from"):
        pixels.main(tiny_pixels(tmp_path, "--resume"))
    assert pixels.main(tiny_pixels(tmp_path, "--stop-at", "1")) == 0
    with pytest.raises(SystemExit, match="was trained with --layer s4: resume with the same, not h3"):
        pixels.main(tiny_pixels(tmp_path, "--resume", "--layer", "h3"))


def test_a_picture_is_the_same_in_any_batch(pixels):
    from shapes import draw

    torch.manual_seed(0)
    model, batch = pixels.Classifier("s4", 8, 2), draw(5, 1)
    together = model(batch.pixels, batch.cu_seqlens)
    lengths = batch.cu_seqlens.diff().tolist()
    for alone, rows in zip(together, batch.pixels.split(lengths), strict=True):
        own = torch.tensor([0, len(rows)], dtype=torch.int32)
        torch.testing.assert_close(model(rows, own)[0], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_training_over_ranks_is_training_on_one(tmp_path, layout):
    pytest.importorskip("matplotlib")
    command = ["examples/train_ring.py", "--steps", "3", "--batch-tokens", "256", "--longest", "128", "--layers", "2"]
    command += ["--folder", str(tmp_path), "--layout", layout]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher in ([sys.executable], torchrun):
        loopback = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, *command], cwd=ROOT, env=loopback, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "Largest difference between the runs' losses" in done.stdout
    assert "at most 1e-05" in done.stdout
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    losses = json.loads((tmp_path / "losses-2.json").read_text())["losses"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
