"""Tensors that depend on sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")

_records: list[list[object]] = []


def constant(make: Callable[P, R]) -> Callable[P, R]:
    """Cache the last few results of a pure function, so that they are not made, and copied to a GPU, for every frame.

    The results carry no gradient and must not be written to. While a program is compiled or exported, or runs on fake
    tensors, they are made anew.
    """
    kept = cast("Callable[P, R]", lru_cache(maxsize=8)(torch.inference_mode(False)(torch.no_grad()(make))))

    def find(*args: P.args, **kwargs: P.kwargs) -> R:
        traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
        if traced:
            return make(*args, **kwargs)
        result = kept(*args, **kwargs)
        for record in _records:
            record.append(result)
        return result

    return find


@contextmanager
def recorded() -> Iterator[list[object]]:
    """Collect the constants that the block uses, for a CUDA graph, which reads them for as long as it lives."""
    record: list[object] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()
