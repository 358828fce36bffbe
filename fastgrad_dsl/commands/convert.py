"""What `fastgrad convert` shows: its progress, and a table of what each phase did."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from rich.console import Console

from fastgrad_dsl.commands.tables import Column, print_table, say
from fastgrad_dsl.commands.terminal import console as console_of_lines
from fastgrad_dsl.commands.train import show
from fastgrad_dsl.conversion.document import Conversion
from fastgrad_dsl.conversion.run import TRANSFER, Request, convert
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.report.words import counted
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Options
from fastgrad_dsl.training.stopping import StopAsked, Stopped, stop_on_signals

COLUMNS = (
    Column("held out", is_number=False),
    Column("tokens"),
    Column("original"),
    Column("before"),
    Column("after\ntransfer"),
    Column("after\ntuning"),
)


def run_convert(request: Request, json: Path | None) -> None:
    """Convert, showing each phase as it comes, and print the report.

    Raises TfgError as `convert`. Raises SystemExit with 128 and the signal's number where a signal stopped it, after
    its checkpoint is saved.
    """
    console = console_of_lines()
    with stop_on_signals() as stop:
        try:
            report = convert(request, _Lines(console), stop)
        except (Stopped, StopAsked) as stopped:
            done = f" after step {stopped.step} of this phase" if isinstance(stopped, Stopped) else ""
            said = f"stopped{done}; the same command with --resume goes on"
            console_of_lines(error=True).print(said, soft_wrap=True)
            raise SystemExit(128 + (stop.signal or 0)) from None
    print_conversion(console, report)
    if json is not None:
        write_atomically(json, to_json(report))


class _Lines:
    """Lines on the terminal, with a bar for each phase."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        """One line."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def phase(self, name: str, options: Options, events: Generator[Event, None, None]) -> None:
        """Run a phase to its end."""
        what = "attention error" if name == TRANSFER else "loss"

        def line(event: Event) -> str:
            if event.validation_loss is not None:
                return f"{name} {event.step:6d}  {what} {event.validation_loss:.4f}, held out  {event.seconds:7.1f} s"
            return (
                f"{name} {event.step:6d}  {what} {event.loss:.4f}  rate {event.learning_rate:.2e}"
                f"  gradient norm {event.gradient_norm:.2f}  {event.seconds:7.1f} s"
            )

        show(self.console, events, options, line)


def print_conversion(console: Console, report: Conversion) -> None:
    """What was converted and what was left, and a row for each quantity and length."""
    near, far = report.near, report.far_dim
    converted = counted(len(report.converted), "attention")
    said = f"{converted} converted: near field in blocks of {near}, maps of width {far}"
    say(console, said)
    for left in report.left:
        say(console, f"left as it is: {left.path}: {left.reason}", indent=2)
    rows = [
        [
            each.what,
            f"{each.tokens:,}",
            *map(_shown, (each.original, each.before, each.transferred, each.tuned)),
        ]
        for each in report.measured
    ]
    print_table(console, COLUMNS, rows)
    tokens = f"{report.transfer_tokens:,} tokens of transfer and {report.tuning_tokens:,} of tuning"
    say(console, f"{tokens}, at most; {report.seconds:.0f} s")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
