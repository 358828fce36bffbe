"""A graph as networkx sees it: for ancestors, orders, matching and drawing. The truth stays in the Graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgrad_compiler.ir.graph import Graph

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(graph: Graph) -> nx.MultiDiGraph[str]:
    """Nodes by name with the attribute `node` (the Node); one edge for each input, with its `position`.

    A node that reads another twice, as in `x * x`, has two edges from it. The view's own attributes are
    `name` and `outputs`.
    """
    import networkx as nx

    view: nx.MultiDiGraph[str] = nx.MultiDiGraph(name=graph.name, outputs=graph.outputs)
    for node in graph.nodes:
        view.add_node(node.name, node=node)
    for node in graph.nodes:
        for position, source in enumerate(node.inputs):
            view.add_edge(source, node.name, position=position)
    return view
