"""What decorates at import time must not load the compiler."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from gemini_hpc.engine import compiler


def test_what_was_deferred_is_compiled_when_it_is_called() -> None:
    real = torch.compile
    compiled: list[tuple[str, dict[str, Any]]] = []

    def spy(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append((function.__name__, options))
        return function

    torch.compile = spy
    try:
        with compiler.deferred():

            @torch.compile(dynamic=True)
            def double(x: int) -> int:
                return 2 * x

            @torch.compile
            def triple(x: int) -> int:
                return 3 * x

        assert torch.compile is spy and not compiled
        assert (double(2), double(3), triple(2)) == (4, 6, 6)
        assert compiled == [("double", {"dynamic": True}), ("triple", {})]
    finally:
        torch.compile = real


def test_a_worker_loads_no_compiler_before_its_engine_is_built() -> None:
    script = "import sys, gemini_hpc.runtime.worker; print({'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert answer.stdout.splitlines()[-1] == "set()", answer.stderr
