"""`python -m attack.fuzz --specs 1000000 --files 100000 --commands`: whatever comes in, a diagnostic goes out.

Mutated specs go through all that `fastgrad check` does; mutated documents and weights through the commands and
functions that read them; every command is called with the extremes of each of its options. A finding is any other
exception than a diagnostic, or a case that takes more than ten seconds of a processor. Cases are a function of the
seed and their number.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from attack.mutations import ROOT, mutated_spec
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import read_source
from fastgrad_grammar.render import render

SECONDS = 10.0  # of processor time: the machine may be busy
WAITING = 600.0  # of the clock: a compiler may be waited for
MEMORY = 8 << 30  # bytes of address space: a case that wants more is a finding, and not the machine's end
STRIDE = 10_000_019  # between the cases of two seeds
EVERY = 60.0  # seconds between two lines about where a run stands


class Hang(BaseException):
    """A case took too long. No Exception: nothing that is attacked catches it."""


@contextmanager
def limited(seconds: float = SECONDS, waiting: float = WAITING) -> Iterator[None]:
    """Raise Hang in the body after so many seconds of processor time, or of waiting."""

    def ring(signal_: int, frame: FrameType | None) -> None:
        raise Hang("10 s of processor time" if signal_ == signal.SIGPROF else "it waits for something")

    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, waiting))
    before = [signal.signal(number, ring) for number, _, _ in clocks]
    try:
        for _, clock, time_ in clocks:
            signal.setitimer(clock, time_)
        yield
    finally:
        for (number, clock, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(clock, 0)
            signal.signal(number, handler)


@dataclass
class Fuzz:
    """A run: outcomes by kind, and one example of each kind of finding, kept in a folder."""

    seed: int
    out: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    started: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def case(self, name: str, attack: Callable[[], str], example: Callable[[], bytes]) -> None:
        """One case: its outcome is counted; what it finds is kept as a file with the example."""
        begin = time.process_time()
        try:
            with limited():
                outcome = attack()
        except (Exception, Hang) as error:
            self._found(name, error, example())
            outcome = "finding"
        self.outcomes[f"{name.partition(' ')[0]}: {outcome}"] += 1
        self.slowest = max(self.slowest, (time.process_time() - begin, name))
        now = time.monotonic()
        if now - self.said > EVERY:
            self.said = now
            print("\n".join(self.lines()), flush=True)

    def _found(self, name: str, error: BaseException, example: bytes) -> None:
        said = next(iter(str(error).splitlines()), "")[:120]
        kind = f"{type(error).__name__} at {_place(error)}"
        kind += f": {said}" if type(error).__name__ == "Told" else ""
        self.findings[kind] += 1
        if self.findings[kind] > 1:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"finding-{len(self.findings)}"
        path.write_bytes(example)
        print(f"\nfound {kind} in {name}, kept as {path}", flush=True)
        print("".join(traceback.format_exception(error)[-6:]), flush=True)

    def lines(self) -> Iterator[str]:
        """What was done so far."""
        seconds = time.monotonic() - self.started
        took, name = self.slowest
        yield f"seed {self.seed}: {self.outcomes.total():,} cases in {seconds:,.0f} s, at most {took:.1f} s ({name})"
        for outcome, count in sorted(self.outcomes.items()):
            yield f"  {outcome}: {count:,}"
        for kind, count in self.findings.most_common():
            yield f"  found {count:,} times: {kind}"


def _place(error: BaseException) -> str:
    """The innermost line of the project that an exception passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "fastgrad_" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno} ({last.name})"


def check(path: Path) -> str:
    """What `fastgrad check` does with a file, as an outcome."""
    try:
        program = elaborate(read_source(path))
    except TfgError as error:
        render(error.diagnostics, colour=True).encode()
        return "refused as text" if error.diagnostics[0].code < "FG2" else "refused as program"
    try:
        run(program, until="plan", validate=False)
    except TfgError as error:
        render(error.diagnostics, colour=True).encode()
        return "refused by a pass"
    return "planned"


def fuzz_specs(fuzz: Fuzz, first: int, count: int, folder: Path) -> None:
    """Mutated specs through the whole front end."""
    path = folder / "fuzz.tfg"
    for index in range(first, first + count):
        data = mutated_spec(random.Random(fuzz.seed * STRIDE + index))
        path.write_bytes(data)
        fuzz.case(f"spec {index}", lambda: check(path), lambda data=data: data)  # type: ignore[misc]


def main(arguments: list[str] | None = None) -> int:
    """Fuzz; the exit status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="attack.fuzz", description=__doc__)
    option = parser.add_argument
    option("--specs", type=int, default=0, help="how many mutated specs")
    option("--files", type=int, default=0, help="how many mutated documents and safetensors files")
    option("--commands", action="store_true", help="every command with the extremes of its options")
    option("--pairs", type=int, default=0, help="with --commands: calls with two options at once")
    option("--first", type=int, default=0, help="the number of the first spec, file and command")
    option("--seed", type=int, default=0)
    option("--out", type=Path, default=ROOT / "build" / "fuzz", help="the folder for findings")
    given = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    fuzz = Fuzz(given.seed, given.out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fuzz_specs(fuzz, given.first, given.specs, folder)
        if given.files:
            from attack.fuzz_files import fuzz_files, readers

            fuzz_files(fuzz, given.first, given.files, readers(folder))
        if given.commands:
            from attack.fuzz_commands import fuzz_commands

            fuzz_commands(fuzz, given.first, given.pairs, folder)
    print("\n".join(fuzz.lines()))
    return 1 if fuzz.findings else 0


if __name__ == "__main__":
    sys.exit(main())
