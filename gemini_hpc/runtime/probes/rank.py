"""One process of the gloo probe: `python -m gemini_hpc.runtime.probes.rank RANK ADDRESS TIMEOUT_S`.

It does what a worker does but for the training: loads torch, offers a store, joins the group at the store that it is
told, and votes. Lines on standard output: the store; then [seconds to load torch, to join, for a vote].
"""

import json
import os
import sys
import time
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemini_hpc.engine.elastic import ElasticWorld

VOTES = 100


def main() -> None:
    rank, address, timeout_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    began = time.monotonic()
    from gemini_hpc.engine.elastic import ElasticWorld

    load_s = time.monotonic() - began
    world = ElasticWorld(rank, 2, address, timeout_s)
    offered = world.open_store()
    print(offered, flush=True)
    store = sys.stdin.readline().strip()
    began = time.monotonic()
    world.join(1, rank, store)
    join_s = time.monotonic() - began
    print(json.dumps([load_s, join_s, median(_vote(world) for _ in range(VOTES))]), flush=True)
    sys.stdin.readline()  # stay until the other one has voted too: this is the end of the probe
    os._exit(0)


def _vote(world: "ElasticWorld") -> float:
    began = time.monotonic()
    world.vote(True)()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
