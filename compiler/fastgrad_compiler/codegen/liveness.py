"""Which nodes of a graph become statements, and until when their values are needed."""

from __future__ import annotations

from fastgrad_compiler.ir.graph import Graph, Node

FOREVER = 1 << 60
_SILENT = frozenset({"input", "weight", "buffer", "literal", "constant"})


class Statements:
    """The statements of a graph: the nodes that the user named, that are read twice, or that give several results.

    Every other node is part of the one expression that reads it, or of none: what no result needs is left out.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        alive = graph.alive
        self.uses = {name: sum(user.name in alive for user in users) for name, users in graph.users.items()}
        for name in graph.outputs:
            self.uses[name] += 1
        self.roots = [node for node in graph.nodes if self._is_root(node)]
        self.position: dict[str, int] = {node.name: i for i, node in enumerate(self.roots)}
        self.last_use = self._last_uses()

    def _is_root(self, node: Node) -> bool:
        if node.op in _SILENT or self.uses[node.name] == 0:
            return False
        if node.op == "item":
            return False
        if node.op == "repeat" or isinstance(node.type, tuple) or node.get("once"):
            return True
        return not node.name.startswith("_") or self.uses[node.name] > 1

    def _last_uses(self) -> dict[str, int]:
        """The position of the last statement that reads a node; an item is read where its tuple's parts are."""
        last: dict[str, int] = {name: -1 for name in self.uses}
        for name in self.graph.outputs:
            last[name] = FOREVER
        for node in reversed(self.graph.nodes):
            at = self.position.get(node.name)
            if at is None:
                at = last[node.name]  # part of the statement that reads it
                if node.op != "item" and at == FOREVER:
                    at = FOREVER - 1
                if node.op == "item":
                    last[node.inputs[0]] = max(last[node.inputs[0]], at)
                    continue
            for name in node.inputs:
                last[name] = max(last[name], at)
        return last

    def statement_of(self, node: Node) -> Node:
        """The node whose place says in which statement of the file a node stands."""
        seen = node
        while seen.name.startswith("_") and self.graph.users[seen.name]:
            seen = self.graph.users[seen.name][0]
        return seen if seen.span is not None else node
