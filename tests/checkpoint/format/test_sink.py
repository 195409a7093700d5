"""Where tensors go in new files."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpar.checkpoint.format.division import Division, Grid, default_division
from meshpar.checkpoint.format.sink import _filled, folder_sink, rank_sink
from meshpar.checkpoint.format.table import Table


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_every_file_takes_as_many_as_its_limit_allows(sizes: list[int], limit: int) -> None:
    wanted, file, filled = [], 0, 0
    for size in sizes:
        if filled and filled + size > limit:
            file, filled = file + 1, 0
        filled += size
        wanted.append(file)
    assert _filled(np.array(sizes, np.int64), limit).tolist() == wanted


def test_wide_elements_come_first_and_names_keep_their_order() -> None:
    tensors = {"b": ("BF16", (3,)), "z": ("F32", (2,)), "a": ("BF16", (5,)), "w": ("I64", ()), "y": ("F32", (2,)), "e": ("F32", (0, 2))}
    for sink in (folder_sink(tensors, 1000), rank_sink(tensors, default_division(tensors, Grid()), {"z": "extra"})):
        assert list(sink.table) == list(tensors) and len(sink.files) == 1
        start = len(sink.files[0].header)
        places = {n: c.begin - start for n, t in sink.table.items() for c in t.chunks if t.nbytes}
        assert places == {"w": 0, "z": 8, "y": 16, "b": 24, "a": 30}
        assert sink.files[0].size == start + 40
        again = Table.of(dict(sink.table))
        assert dict(again) == dict(sink.table) and len(again.groups) == len(sink.table.groups)


def test_no_tensors_make_no_files() -> None:
    assert rank_sink({}, Division(), {}).files == () and len(rank_sink({}, Division(), {}).table) == 0
