"""Files with something wrong in them, drawn by hypothesis."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from(
        [1e300, -0.5, float("nan"), float("inf"), 2**31, 2**70, 10**400, "", "1", "Q1", "\u00e9", "\ud800", "P" * 30]
    ),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-1, 5), st.floats(), st.none(), st.text(max_size=1)), max_size=3),
    st.lists(st.lists(st.floats(-100, 1e9), min_size=5, max_size=8), min_size=1, max_size=2),  # nearly polygons
    st.dictionaries(st.sampled_from(["counts", "size", "id"]), st.one_of(st.integers(-1, 5), st.none()), max_size=2),
    st.builds(lambda counts: {"size": [4, 6], "counts": counts}, st.lists(st.integers(-1, 24), max_size=4)),
    st.builds(lambda counts: {"size": [4, 6], "counts": counts}, st.text("0123456789:;<=>?@OPQRSTUVWXYZ", max_size=8)),
)


@st.composite
def broken(draw: st.DrawFn, content: Any) -> Any:
    """``content`` with one to three values, at any depth, replaced, left out or repeated."""
    root = [copy.deepcopy(content)]
    for _ in range(draw(st.integers(1, 3))):
        owner, key = draw(st.sampled_from(list(_places(root))))
        change = draw(st.sampled_from(["replace", "replace", "leave out", "repeat"]))
        if owner is root or change == "replace":
            owner[key] = draw(WRONG)
        elif change == "leave out":
            del owner[key]
        elif isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
    return root[0]


def _places(owner: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of nested lists and objects, as what holds it and its index or key."""
    for key in list(range(len(owner)) if isinstance(owner, list) else owner):
        yield owner, key
        if isinstance(owner[key], (list, dict)):
            yield from _places(owner[key])


@st.composite
def broken_text(draw: st.DrawFn, content: Any) -> bytes:
    """The JSON of ``content``, cut off or with a few bytes changed."""
    text = bytearray(json.dumps(content).encode())
    if draw(st.booleans()):
        return bytes(text[: draw(st.integers(0, len(text) - 1))])
    for _ in range(draw(st.integers(1, 3))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return bytes(text)
