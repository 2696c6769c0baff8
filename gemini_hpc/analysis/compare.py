"""The proof: every loss that was ever logged against those of an undisturbed run, bit for bit."""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini_hpc.errors import GeminiError


@dataclass(frozen=True)
class Difference:
    """Two losses of one (rank, step) that are not the same 64 bits."""

    rank: int
    step: int
    loss: float
    reference: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank}, step {self.step}: {self.loss!r} ({_hex(self.loss)}) "
            f"instead of {self.reference!r} ({_hex(self.reference)})"
        )


@dataclass(frozen=True)
class Comparison:
    """`compared` logged losses (a step that was replayed counts each time), of which `equal` are the same
    bits.

    `first_difference` is the one at the lowest step. `missing` are the (rank, step) of the reference that
    were never logged: an agent that dies may take its last lines with it. `unknown` are those
    that the reference does not have.
    """

    compared: int
    equal: int
    first_difference: Difference | None
    missing: tuple[tuple[int, int], ...]
    unknown: tuple[tuple[int, int], ...]

    @property
    def identical(self) -> bool:
        """Whether there was something to compare, and no loss differs. Losses that are not there do not."""
        return self.compared > 0 and self.first_difference is None

    def __str__(self) -> str:
        """Say it in one sentence."""
        if not self.compared:
            return "there are no losses to compare with the undisturbed run"
        if self.first_difference is None:
            verdict = f"all {self.compared} losses equal those of the undisturbed run to the last bit"
        else:
            verdict = (
                f"{self.compared - self.equal} of {self.compared} losses differ from those of the "
                f"undisturbed run, first at {self.first_difference}"
            )
        absent = [
            f"{len(keys)} {what}"
            for keys, what in ((self.missing, "not logged"), (self.unknown, "not in the reference"))
            if keys
        ]
        return "; ".join([verdict, *absent])


def compare(losses: Iterable[Mapping[str, Any]], reference: Iterable[Mapping[str, Any]]) -> Comparison:
    """Compare `losses` with those of the undisturbed `reference`; both are mappings with rank, step and loss.

    `losses` may be all events of a run: those that tell no loss are passed over. They may name a (rank, step) several
    times: a replayed step has to come to the same loss again, and a snapshot that is restored tells its step's.
    """
    expected = {_key(line): float(line["loss"]) for line in reference}
    logged = [event for event in losses if tells_loss(event)]
    seen = {_key(event) for event in logged}
    compared = equal = 0
    differences = []
    for event in logged:
        key = _key(event)
        if key not in expected:
            continue
        compared += 1
        loss = float(event["loss"])
        if _bits(loss) == _bits(expected[key]):
            equal += 1
        else:
            differences.append(Difference(*key, loss, expected[key]))
    first = min(differences, key=lambda d: (d.step, d.rank), default=None)
    return Comparison(
        compared, equal, first, tuple(sorted(expected.keys() - seen)), tuple(sorted(seen - expected.keys()))
    )


def tells_loss(event: Mapping[str, Any]) -> bool:
    """Whether an event of a run names the loss of a step: by having done it, or having restored it (but the first)."""
    return event.get("kind", "step") in ("step", "resumed") and event.get("loss") is not None


def read_reference(run_dir: Path) -> list[dict[str, Any]]:
    """Return the losses of the undisturbed run, lines {"rank", "step", "loss"}; none when it was not made.

    May be called while it is being made: a last line without its end is left out. Raises GeminiError when
    the file is damaged.
    """
    path = run_dir / "reference" / "losses.jsonl"
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise GeminiError(f"cannot read {path}: {error.strerror}") from error
    lines = []
    for number, text_line in enumerate(text.split("\n")[:-1], start=1):
        try:
            line = json.loads(text_line)
            lines.append({"rank": int(line["rank"]), "step": int(line["step"]), "loss": float(line["loss"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise GeminiError(f"{path} is damaged in line {number}: {ascii(str(error))[:100]}") from error
    return lines


def _key(line: Mapping[str, Any]) -> tuple[int, int]:
    return int(line["rank"]), int(line["step"])


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)


def _hex(value: float) -> str:
    """Return the bits of a double: float.hex would not tell one NaN from another."""
    return "0x" + struct.pack(">d", value).hex()
