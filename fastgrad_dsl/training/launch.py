"""`fastgrad train --nproc N`: PyTorch's elastic agent in this process starts the others, and starts them again."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastgrad_dsl.training.ranks import LOST
from fastgrad_grammar.diagnostics import TfgError

STOP_SECONDS = 600  # to end a step and save it, after a signal


def launch(count: int, restarts: int, work: Callable[[list[str]], int]) -> int:
    """work(arguments of this command) in each of `count` processes; the largest status that they give.

    A process that ends otherwise ends all of them, and they begin anew, `restarts` times at most. TfgError FG504 then.
    """
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # what they say is said below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="fastgrad",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        shutdown_timeout=STOP_SECONDS,
    )
    try:
        found: dict[int, int] = elastic_launch(config, work)(sys.argv[1:])
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        raise _failed(error, restarts) from None
    return max(found.values())


def _failed(error: ChildFailedError, restarts: int) -> TfgError:
    """Of all that failed the one that was not merely left by another."""
    failures = sorted(
        error.failures.items(), key=lambda found: (found[1].exitcode == LOST, found[1].timestamp)
    )
    rank, failure = failures[0]
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if code == LOST:
        how = "lost another process"
    message = f"rank {rank} (process {failure.pid}) {how}, and all were started again {restarts} times"
    return TfgError.of("FG504", message, "the checkpoint is whole: --resume goes on from there")
