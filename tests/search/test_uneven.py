"""Solved bands: the least slowest place, the certificate, and what uneven bands win on devices of different speed."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from distri.core.plan import ImageRequest
from distri.search.find import Search
from distri.search.request import SearchRequest
from distri.search.space import Layout
from distri.search.uneven import gather_costs, solve
from distri.simulator.collective import CollectiveModel
from tests.search.spaces import cluster_of, graph_of

steps = st.lists(st.integers(0, 50), min_size=9, max_size=9)


def splits(units: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(units,)]
    return [(n, *rest) for n in range(1, units - parts + 2) for rest in splits(units - n, parts - 1)]


@given(st.lists(steps, min_size=1, max_size=3), st.integers(3, 8))
def test_the_solved_split_is_the_best_of_all(increments: list[list[int]], units: int) -> None:
    tables = [list(accumulate(rises, initial=1)) for rises in increments]
    solved = solve([table.__getitem__ for table in tables], units)
    best = min(
        max(table[count] for table, count in zip(tables, split, strict=True))
        for split in splits(units, len(tables))
    )
    assert solved.step_ns == best == solved.bound_ns
    assert solved.gap == 0
    assert sum(solved.units) == units
    assert solved.step_ns <= solved.even_ns
    assert solved.ideal_ns <= solved.step_ns


def test_two_speeds_need_uneven_bands() -> None:
    """Four devices, two of half the speed: even bands reach at most 75 % of the ideal, solved ones at least 90 %."""
    request = SearchRequest(ImageRequest(2048, 2048, 10), 4, "float16", speeds=((2, 0.5), (3, 0.5)))
    search = Search(graph_of("sdxl"), cluster_of("a100-sxm"), request)
    even = Layout(1, 4, next(search.layouts()).axis, (4, 1), None, (0, 1, 2, 3))
    solved = search.solve_bands(even, 64)
    assert solved.even_share_of_ideal <= 0.75
    assert solved.share_of_ideal >= 0.90
    uneven = dataclasses.replace(even, units=solved.units)
    serving = search.run().best.serving
    times = [
        search.bounder(layout).lowering.latency_ns(search.sketcher.sketch(layout, serving))
        for layout in (even, uneven)
    ]
    assert times[1] < 0.8 * times[0]


def test_padding_and_messages_are_both_costed() -> None:
    model = CollectiveModel(cluster_of("a100-sxm"))
    alike = gather_costs(model, (0, 1, 2, 3), (2**20,) * 4)
    skewed = gather_costs(model, (0, 1, 2, 3), (2**26, 2**10, 2**10, 2**10))
    assert alike.best in ("padding", "send/recv")
    assert skewed.messages_s < skewed.padded_s
    assert skewed.best == "send/recv"
