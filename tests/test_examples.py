"""The parts of make demo: its texts, its batches, and that padded and packed are the same model."""

from pathlib import Path

import pytest
import torch
from packseq.nn import BertConfig, BertEncoder, mean_pool


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))


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
