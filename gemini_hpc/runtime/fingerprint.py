"""What must not change between the start of a run and its resumption."""

import hashlib
import json

from gemini_hpc.config import RunConfig


def fingerprint(run: RunConfig) -> str:
    """Digest of the settings on which the bits of a run depend (not: where, or how protected)."""
    settings = {
        "train": run.train.model_dump(mode="json"),  # threads too: they order the sums
        "model": run.model.model_dump(mode="json"),
        "data": run.data.model_dump(mode="json"),
        "nodes": run.cluster.nodes,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
