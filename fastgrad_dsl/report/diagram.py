"""A model as a picture: blocks as boxes, values as lines, each attention in the colour of what was decided for it.

Only what calls, repeats, attends or joins values is drawn. A block is drawn open where an attention is inside. Boxes
lie in rows by their longest way from the input; a line that skips a row runs at the right of the boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from markupsafe import Markup

from fastgrad_compiler.attention.table import AttentionEntry, attention_table, stands_alone
from fastgrad_compiler.attention.value import ATTENTION
from fastgrad_compiler.ir.calls import graphs_with, reachable, runs
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_dsl.plots.svg import LETTER, element, figure, text
from fastgrad_dsl.report.words import decided

COLOURS = {"exact": "#868e96", "polynomial": "#1c7ed6", "own": "#2f9e44", "open": "#e8590c"}
KINDS = {
    "exact": "exact attention",
    "polynomial": "attention by a polynomial, within a budget",
    "own": "attention whose weights are a polynomial of the model's own",
    "open": "attention that is not decided",
}
STYLE = (
    "<style>.fg-model text{font:12px system-ui,sans-serif;fill:#1f2328}.fg-model .name{font-weight:600}"
    ".fg-model .paper{fill:#fff}.fg-model .box{fill:#f6f8fa;stroke:#8c959f}.fg-model .line{fill:none;stroke:#57606a}"
    ".fg-model .end{fill:#57606a}@media(prefers-color-scheme:dark){.fg-model text{fill:#e6edf3}"
    ".fg-model .paper{fill:#0d1117}.fg-model .box{fill:#161b22;stroke:#6e7681}.fg-model .line{stroke:#8b949e}"
    ".fg-model .end{fill:#8b949e}}</style>"
)
GAP, PADDING, LINE, LANE = 18.0, 12.0, 16.0, 9.0
LARGEST = 400  # boxes of a block that is drawn open
JOINS = {"add": "+", "mul": "×", "sub": "-", "concat": "concat"}
IN = ""  # the name of what enters a graph


@dataclass(frozen=True)
class Box:
    """A box at its place within the one around it; `lines` are its texts, the first its name."""

    lines: tuple[str, ...]
    kind: str = "block"
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    inside: tuple[Box, ...] = ()
    wires: tuple[tuple[tuple[float, float], ...], ...] = field(default=(), repr=False)


def draw(program: Program) -> str:
    """The picture of a program after `plan`, as the text of an SVG file. Deterministic."""
    table = attention_table(program)
    whole = _Drawing(program, table).graph(program[program.main], (program.name,))
    kinds = [kind for kind in KINDS if any(_kind(entry) == kind for entry in table)]
    width = max(whole.width, max((LETTER * len(KINDS[kind]) + 24 for kind in kinds), default=0)) + 2 * GAP
    height = whole.height + 2 * GAP + LINE * len(kinds)
    paper = element('<rect class="paper" width="{:g}" height="{:g}"/>', width, height)
    parts = [paper, *_boxes(whole, (width - whole.width) / 2, GAP)]
    for place, kind in enumerate(kinds):
        y = whole.height + 1.5 * GAP + LINE * (place + 0.5)
        parts.append(
            element(
                '<rect x="{:g}" y="{:g}" width="12" height="12" rx="2" fill="{}"/>',
                GAP,
                y - 10,
                COLOURS[kind],
            )
        )
        parts.append(text(GAP + 20, y, KINDS[kind]))
    shown = Markup('<g class="fg-model">') + Markup("").join(parts) + Markup("</g>")
    said = "; ".join(f"{entry.path}: {decided(entry)}" for entry in table) or "no attention"
    return figure("model", f"model {program.name}", said, height, [shown], width, STYLE) + "\n"


def _kind(entry: AttentionEntry) -> str:
    attention = entry.attention
    if attention.is_own:
        return "own"
    if attention.is_polynomial:
        return "polynomial"
    return "open" if attention.verdict is None else "exact"


class _Drawing:
    """The boxes of a program's graphs, each graph laid out once."""

    def __init__(self, program: Program, table: Sequence[AttentionEntry]) -> None:
        self.program = program
        self.entries = {(entry.graph, entry.node.name): entry for entry in table}
        self.open = graphs_with(program, lambda node: node.op in ATTENTION)
        self.done: dict[tuple[str, tuple[str, ...]], Box] = {}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """How many boxes each graph is, drawn open."""
        found: dict[str, int] = {}
        for graph in reachable({each.name: each for each in self.program.graphs}, [self.program.main]):
            called = [name for node in graph.nodes for name, _ in runs(node)]
            found[graph.name] = (
                1 + len(called) + sum(found[name] for name in called if found[name] <= LARGEST)
            )
        return found

    def graph(self, graph: Graph, lines: tuple[str, ...]) -> Box:
        """A graph as a box with its parts inside."""
        if (graph.name, lines) not in self.done:
            self.done[graph.name, lines] = self._laid_out(graph, lines)
        return self.done[graph.name, lines]

    def _laid_out(self, graph: Graph, lines: tuple[str, ...]) -> Box:
        flow = _Flow(graph, lambda node: self._is_box(node))
        boxes = {node.name: self._box(graph, node) for node in flow.shown}
        rows: dict[int, list[str]] = {}
        for name in boxes:
            rows.setdefault(flow.rows[name], []).append(name)
        wide = max(
            [sum(boxes[name].width for name in row) + GAP * (len(row) - 1) for row in rows.values()]
            + [LETTER * len(line) for line in lines]
        )
        placed: dict[str, Box] = {}
        y = PADDING + LINE * len(lines) + GAP
        for row in (rows[number] for number in sorted(rows)):
            x = PADDING + (wide - sum(boxes[name].width for name in row) - GAP * (len(row) - 1)) / 2
            for name in row:
                placed[name] = _at(boxes[name], x, y)
                x += boxes[name].width + GAP
            y += max(boxes[name].height for name in row) + GAP
        entry = (PADDING + wide / 2, PADDING + LINE * len(lines))
        wires, lanes = _wires(flow, placed, entry, (entry[0], y + GAP / 2 - PADDING), PADDING + wide)
        width = wide + 2 * PADDING + LANE * lanes
        return Box(lines, "block", width, y + GAP / 2, inside=tuple(placed.values()), wires=wires)

    def _is_box(self, node: Node) -> bool:
        return node.op in ("call", "repeat") or node.op in ATTENTION

    def _box(self, graph: Graph, node: Node) -> Box:
        entry = self.entries.get((graph.name, node.name))
        if entry is not None:
            return _leaf((entry.node.op.replace("_", " "), decided(entry)), _kind(entry))
        if node.op == "call":
            return self._called(node)
        if node.op == "repeat":
            return self._repeated(node)
        return _leaf((JOINS.get(node.op, node.op),), "join")

    def _called(self, node: Node) -> Box:
        name = str(node["graph"])
        label, called = str(node.get("label", "")), self.program[name]
        block = called.block or name
        title = label if label == block.rpartition(".")[2] else f"{label}: {block}"
        if stands_alone(self.program, name):
            inside = next(entry for (graph, _), entry in self.entries.items() if graph == name)
            return _leaf((title, decided(inside)), _kind(inside))
        return self._inside(name, title)

    def _inside(self, name: str, title: str) -> Box:
        """A graph, drawn open where an attention is inside and it is not too large."""
        if name not in self.open:
            return _leaf((title,), "block")
        if self.sizes[name] > LARGEST:
            return _leaf((title, f"{self.sizes[name]:,} boxes inside, not drawn"), "block")
        return self.graph(self.program[name], (title,))

    def _repeated(self, node: Node) -> Box:
        boxes = [self._inside(name, f"{times} times" if times > 1 else "once") for name, times in runs(node)]
        if len(boxes) == 1:
            return boxes[0]
        wide = max(box.width for box in boxes)
        placed: list[Box] = []
        wires: list[tuple[tuple[float, float], ...]] = []
        y = PADDING + LINE
        for box in boxes:
            if placed:
                wires.append(((PADDING + wide / 2, y - GAP), (PADDING + wide / 2, y)))
            placed.append(_at(box, PADDING + (wide - box.width) / 2, y))
            y += box.height + GAP
        return Box(("in turn",), "block", wide + 2 * PADDING, y, inside=tuple(placed), wires=tuple(wires))


class _Flow:
    """Which of the nodes of a graph are shown, what each reads of the others, and in which row it stands."""

    def __init__(self, graph: Graph, is_box: Callable[[Node], bool]) -> None:
        self.shown: list[Node] = []
        self.reads: dict[str, tuple[str, ...]] = {}
        self.rows: dict[str, int] = {IN: 0}
        origins: dict[str, tuple[str, ...]] = {}
        for node in graph.nodes:
            read = tuple(dict.fromkeys(name for each in node.inputs for name in origins.get(each, ())))
            if node.op == "input":
                origins[node.name] = (IN,)
            elif is_box(node) or len(read) > 1:
                self.shown.append(node)
                self.reads[node.name] = read
                self.rows[node.name] = 1 + max((self.rows[name] for name in read), default=0)
                origins[node.name] = (node.name,)
            else:
                origins[node.name] = read
        self.results = tuple(dict.fromkeys(name for each in graph.outputs for name in origins.get(each, ())))
        self.last = 1 + max(self.rows.values())


def _leaf(lines: tuple[str, ...], kind: str) -> Box:
    width = max(LETTER * len(line) for line in lines) + 2 * PADDING
    return Box(lines, kind, width, LINE * len(lines) + PADDING)


def _at(box: Box, x: float, y: float) -> Box:
    return Box(box.lines, box.kind, box.width, box.height, x, y, box.inside, box.wires)


def _wires(
    flow: _Flow,
    placed: Mapping[str, Box],
    entry: tuple[float, float],
    end: tuple[float, float],
    right: float,
) -> tuple[tuple[tuple[tuple[float, float], ...], ...], int]:
    """The lines between boxes, and how many lanes those take that skip a row."""
    wires: list[tuple[tuple[float, float], ...]] = []
    lanes: list[int] = []  # the row below which each lane is free
    links: list[tuple[str, str | None]] = [
        (source, name) for name, read in flow.reads.items() for source in read
    ]
    links += [(source, None) for source in flow.results]
    for source, target in sorted(links, key=lambda link: flow.rows[link[0]]):
        first = flow.rows[source]
        last = flow.last if target is None else flow.rows[target]
        if last - first <= 1:
            top = entry if source == IN else _bottom(placed[source])
            wires.append((top, end if target is None else _top(placed[target])))
            continue
        lane = next((place for place, free in enumerate(lanes) if free <= first), len(lanes))
        lanes[lane : lane + 1] = [last]
        x = right + LANE * (lane + 1)
        begin = entry if source == IN else _right(placed[source])
        into = end if target is None else _right(placed[target])
        wires.append((begin, (x, begin[1]), (x, into[1]), into))
    return tuple(wires), len(lanes)


def _top(box: Box) -> tuple[float, float]:
    return box.x + box.width / 2, box.y


def _bottom(box: Box) -> tuple[float, float]:
    return box.x + box.width / 2, box.y + box.height


def _right(box: Box) -> tuple[float, float]:
    return box.x + box.width, box.y + box.height / 2


def _boxes(box: Box, x: float, y: float) -> Iterator[Markup]:
    """A box at a place of the picture, its texts, its lines and what is inside."""
    left, top = x + box.x, y + box.y
    colour = (
        element(' style="stroke:{0};stroke-width:2;fill:{0};fill-opacity:.18"', COLOURS[box.kind])
        if box.kind in COLOURS
        else ""
    )
    shape = '<rect class="box" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="5"{}/>'
    yield element(shape, left, top, box.width, box.height, Markup(colour))
    for place, line in enumerate(box.lines):
        kind = "name" if place == 0 else ""
        yield text(left + box.width / 2, top + PADDING / 2 + LINE * (place + 0.8), line, "middle", kind)
    for points in box.wires:
        path = "L".join(f"{left + px:.1f} {top + py:.1f}" for px, py in points)
        yield element('<path class="line" d="M{}"/>', path)
        end = points[-1]
        yield element('<circle class="end" cx="{:.1f}" cy="{:.1f}" r="2.5"/>', left + end[0], top + end[1])
    for each in box.inside:
        yield from _boxes(each, left, top)
