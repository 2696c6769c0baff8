"""Examine in a process of its own: pytest's has threads, and what is looked at may be a limit on the whole process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemini_hpc.config import load_run
from gemini_hpc.doctor import case_for
from gemini_hpc.runtime.probes import Case
from gemini_hpc.runtime.processes import RUN_MARK, marked

SHM = Path("/dev/shm")
WAIT_S = 100.0

NOBODY = "if os.geteuid() == 0: os.setuid(65534)"
"""Source text: root is held neither to modes of files nor to the limit on processes."""

SCRIPT = """
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path
from gemini_hpc.config import load_run
from gemini_hpc.doctor import case_for
from gemini_hpc.errors import GeminiError, UserError
from gemini_hpc.runtime.probes import Probe, examine, machine, network, probes_for, storage
from gemini_hpc.runtime.probes.examine import ok

undo = None
def tick():
    pass
with case_for(load_run(None, sys.argv[3:], site="local")) as case:
    probe = {probe.name: probe for probe in probes_for(case.run)}.get(sys.argv[1])
    exec(sys.argv[2])
    probe = probe or Probe("trial", "a thing that never comes", 3, look, "do that", undo)
    try:
        finding = examine(probe, case, tick)
        print(json.dumps([case.id, finding.level, finding.text]))
    except TimeoutError:
        print(json.dumps([case.id, "", "interrupted"]))
"""


@contextmanager
def planned(*overrides: str) -> Iterator[Case]:
    """Make a case as the command line does, for a probe that is called in this very process."""
    with case_for(load_run(None, overrides, site="local")) as case:
        yield case


@dataclass(frozen=True)
class Examined:
    """What was found; `left` by the probe: its processes, and its files in memory."""

    level: str
    text: str
    left: list[str]


def probe(name: str, *overrides: str, before: str = "", **environment: str) -> Examined:
    """Examine with the probe of that name, after `before` in the same process."""
    script = [sys.executable, "-c", SCRIPT, name, before, *overrides]
    answer = subprocess.run(
        script,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert answer.returncode == 0, answer.stderr
    case, level, text = json.loads(answer.stdout)
    assert "\n" not in text
    left = [str(path) for path in SHM.glob(f"gemini-{case}*")] + [str(pid) for pid in marked(RUN_MARK, case)]
    return Examined(level, text, left)


def look(source: str, *overrides: str) -> Examined:
    """Examine with a probe of three seconds; `source` defines its `look(case)`, and may define `undo` and `tick`."""
    return probe("", *overrides, before=source)
