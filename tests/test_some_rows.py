"""Some of a tensor's rows: few runs of them and many give what indexing gives."""

import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from packseq.ring.some_rows import SomeRows


@given(st.data())
def test_rows_are_those_of_an_index(data):
    total = data.draw(st.integers(0, 200))
    if data.draw(st.booleans()):
        rows = sorted(data.draw(st.sets(st.integers(0, total - 1)))) if total else []  # mostly runs of one row
    else:
        cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=8)))
        rows = [row for begin, end in zip(cuts[::2], cuts[1::2], strict=False) for row in range(begin, end)]
        rows = sorted(set(rows))
    rows = torch.tensor(rows, dtype=torch.int64)
    some = SomeRows(rows, torch.device("cpu"))
    assert some.count == len(rows)
    x, narrow = torch.randn(total, 3, 4), torch.randn(total, 2, dtype=torch.bfloat16)
    assert_same_bits("of", some.of(x), x[rows])
    assert_same_bits("of a view", some.of(x.transpose(1, 2)), x.transpose(1, 2)[rows])

    put = narrow.clone()
    values = torch.randn(len(rows), 2)
    some.put(put, values)
    expected = narrow.clone()
    expected[rows] = values.bfloat16()
    assert_same_bits("put", put, expected)

    y, other = torch.randn(total, 5), torch.randn(len(rows), 5)
    sums = [x.clone(), y.clone()]
    some.add(sums, [torch.ones(len(rows), 3, 4), other])
    x[rows] += 1
    y[rows] += other
    for got, right in zip(sums, (x, y), strict=True):
        assert_same_bits("add", got, right)


def test_rows_that_stand_together_are_not_copied():
    x = torch.randn(9, 2)
    assert SomeRows(torch.arange(3, 7), x.device).of(x).data_ptr() == x[3].data_ptr()
    assert SomeRows(torch.arange(0), x.device).of(x).shape == (0, 2)
