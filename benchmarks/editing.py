"""How long the language server takes for one edit of a long file: `python -m benchmarks.editing`.

Each example is made at least 500 lines long by copies of its blocks, which the model does not call; a model of that
length that calls them all is measured too. Times are those of the processor, medians over edits.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastgrad_dsl.lsp.workspace import Workspace

LINES, EDITS = 500, 20
EXAMPLES = Path(__file__).parents[1] / "examples"
_BLOCK = re.compile(r"^block .*?^}\n", re.MULTILINE | re.DOTALL)


def lengthened(text: str) -> str:
    """A spec with copies of its blocks at its end."""
    blocks, copies = _BLOCK.findall(text), 0
    while text.count("\n") < LINES:
        copies += 1
        for block in blocks:
            text += "\n" + re.sub(r"^block (\w+)", rf"block \1_{copies}", block)
    return text


def deep() -> str:
    """A spec in which every block is called."""
    base = (EXAMPLES / "spelled_out.tfg").read_text(encoding="utf-8")
    (block,) = _BLOCK.findall(base)
    count = LINES // block.count("\n") + 1
    copies = [block.replace("block layer", f"block layer_{place}") for place in range(count)]
    calls = "".join(
        f"        x = layer_{place}(x; heads, qk_dim) as layers_{place}\n" for place in range(count)
    )
    text = base.replace("        x = layer(x; heads, qk_dim) as layers\n", calls)
    return text.replace('    at "layers.0.*" relative <= 0.02\n', "") + "\n".join(["", *copies])


def measure(text: str) -> tuple[float, float]:
    """(seconds of a check after an edit, seconds of the first one)."""
    known = Workspace()
    with tempfile.TemporaryDirectory() as folder:
        uri = (Path(folder) / "spec.tfg").as_uri()

        def check(version: int) -> None:
            edited = text.replace("return x", f"return {version + 1}.0 * x", 1).replace(
                "# ", f"# {version} ", 1
            )
            found = known.check(known.put(uri, version, edited).path)
            assert not found.diagnostics, found.diagnostics

        first = _timed(partial(check, 0))
        return statistics.median(_timed(partial(check, place)) for place in range(1, EDITS)), first


def _timed(run: Callable[[], None]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def main() -> None:
    """Print a row for each example."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.tfg"))}
    texts = {name: lengthened(text) for name, text in texts.items() if _BLOCK.search(text)}
    for name, text in {**texts, "every block is called": deep()}.items():
        edit, first = measure(text)
        print(
            f"{name:24} {text.count(chr(10)):4} lines  {1000 * edit:6.1f} ms an edit  {1000 * first:6.1f} ms the first"
        )


if __name__ == "__main__":
    main()
