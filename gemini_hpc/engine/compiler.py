"""Keeps an import from loading torch's compiler, which takes longer than loading torch and DeepSpeed together."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deferred() -> Iterator[None]:
    """What is decorated with torch.compile meanwhile is compiled when it is first called.

    DeepSpeed 0.19.8 decorates three functions of its Muon optimizer, and with them came half of a worker's start.
    """
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return lambda decorated: compile_later(decorated, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
