"""GEMINI for Slurm: DeepSpeed ZeRO-3 training that survives the loss of a node within a second.

The public name is `Training`: what a user's entry point returns. It is loaded on first use, because
`submit`, `status` and the agents must start without importing torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemini_hpc.engine.training import Training

__version__ = "0.1.0"
__all__ = ["Training", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Training":
        from gemini_hpc.engine.training import Training

        return Training
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
