"""Records of what the guards of a model counted, through the standard library's logging.

    fg.log_budget(model, every=10)
    logging.getLogger("fastgrad.budget").addHandler(fg.JsonLinesHandler("budget.jsonl"))

A record of the logger carries `budget`, the dicts of `model.budget_status()`, and `step`, the number of the forward
pass. The guards' own messages, one for each attention, go to the same logger as warnings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastgrad_dsl.documents.base import finite
from fastgrad_grammar.quote import json_text

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

LOGGER = logging.getLogger("fastgrad.budget")


def log_budget(model: nn.Module, every: int = 1) -> RemovableHandle:
    """Log the budget's state after every `every`-th forward pass of a generated model; returns the hook's handle.

    Records have the level INFO; a logger without a level of its own is set to it. Each record waits for the device.
    With torch.compile, pass what it returns. A model without guards logs nothing.

    Raises ValueError if `every` is below 1, TypeError if the model has no `budget_status`.
    """
    if every < 1:
        raise ValueError(f"every is an int of at least 1, not {every}")
    status: Callable[[], list[dict[str, object]]] | None = getattr(model, "budget_status", None)
    if status is None:
        raise TypeError(f"{type(model).__name__} has no budget_status: give a model that fastgrad compiled")
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    step = 0

    def log(*_: object) -> None:
        nonlocal step
        step += 1
        if step % every == 0 and LOGGER.isEnabledFor(logging.INFO) and (found := status()):
            LOGGER.info("%s", _summary(found), extra={"budget": found, "step": step})

    return model.register_forward_hook(log)


def _summary(found: list[dict[str, object]]) -> str:
    broken = [str(one["path"]) for one in found if one["violations"]]
    state = f"beyond their range: {', '.join(broken)}" if broken else "no logit seen beyond its range"
    unsettled = sum(int(str(one["unsettled"])) for one in found)
    return f"{len(found)} guarded attentions, {state}" + (
        f", {unsettled} calls unsettled" if unsettled else ""
    )


class JsonLinesHandler(logging.FileHandler):
    """Appends records of the logger to a file, one JSON object per line.

    For each attention of a budget's record: time (seconds since 1970), step, and its dict; for others time, level and
    message. Numbers that are not finite become null.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, encoding="utf-8")

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        budget = getattr(record, "budget", None)
        if budget is None:
            rows = [{"time": record.created, "level": record.levelname, "message": record.getMessage()}]
        else:
            step = getattr(record, "step", None)
            rows = [{"time": record.created, "step": step, **status} for status in budget]
        return "\n".join(json_text(finite(row)) for row in rows)


class TensorBoardHandler(logging.Handler):
    """Writes the budget's records to a folder for TensorBoard.

    Scalars by path: largest (the largest |s| seen), share (of R: above 1 is beyond the range), calls and violations.

    Raises ImportError if the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            help_ = "pip install 'fastgrad-dsl[tensorboard]'"
            raise ImportError(f"TensorBoardHandler needs the package tensorboard: {help_}") from error
        self._writer: Any = SummaryWriter(str(folder))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the scalars of a record; records without a budget are ignored."""
        try:
            for status in getattr(record, "budget", ()):
                for name, value in _scalars(status).items():
                    self._writer.add_scalar(f"{status['path']}/{name}", value, getattr(record, "step", 0))
        except Exception:  # as handlers of the standard library do: a log that fails stops no training
            self.handleError(record)

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
        super().close()


def _scalars(status: Mapping[str, Any]) -> dict[str, float]:
    bounds, heads = status["bound"], cast("list[float]", status["heads"])
    bounds = bounds if isinstance(bounds, list) else [bounds] * len(heads)
    share = max((logit / bound for logit, bound in zip(heads, bounds, strict=True)), default=0.0)
    counted = {name: float(status[name]) for name in ("calls", "violations")}
    return {"largest": status["largest"], "share": share, **counted}
