"""The diagram of what flows where: apps publish on channels, groups read them; in columns, from left to right."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from pipeline.deadletters import internal

from .state import GONE_AFTER, State, pair

__all__ = ["diagram"]

REMEMBERED = 900.0
"""Seconds for which an app that published on a channel counts as a publisher of it."""
HIDDEN = ("dashboard", "cli")
"""Apps that look, and do not take part."""


@dataclass
class _Graph:
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def edge(self, source: str, target: str, rate: float, group: str = "") -> None:
        new = {"from": source, "to": target, "group": group, "rate": 0.0}
        self.edges.setdefault((source, target, group), new)["rate"] += rate

    def ends(self) -> set[tuple[str, str]]:
        return {(source, target) for source, target, _ in self.edges}


def diagram(state: State, now: float) -> dict[str, Any]:
    """`{"nodes": [{id, kind, label, column, row, …}], "edges": [{from, to, group, rate}]}`; ids begin `app:` or
    `channel:`. An edge that has a group leads from the channel it reads to the app it is in."""
    graph = _Graph()
    _add_channels(graph, state)
    _add_apps(graph, state, now)
    ends = graph.ends()
    linked = {end for edge in ends for end in edge}
    nodes = {
        id_: node for id_, node in graph.nodes.items() if id_ in linked or (node["kind"] == "channel" and node["count"])
    }
    _place(nodes, ends, _columns(nodes, ends))
    return {"nodes": list(nodes.values()), "edges": [_rounded(edge) for edge in graph.edges.values()]}


def _rounded(edge: dict[str, Any]) -> dict[str, Any]:
    return {**edge, "rate": round(edge["rate"], 1)}


def _add_channels(graph: _Graph, state: State) -> None:
    for name, channel in (state.ledger.channels if state.ledger else {}).items():
        if internal(name):
            continue
        groups = channel.groups.values() if channel.durable else ()
        graph.nodes[f"channel:{name}"] = {
            "id": f"channel:{name}",
            "kind": "channel",
            "label": name,
            "durable": channel.durable,
            "count": channel.published,
            "rate": round(state.rates.get(name, 0.0), 1),
            "waiting": sum(group.lag + group.pending for group in groups),
            "dead": sum(group.dead for group in groups),
            "groups": len(channel.groups),
        }


def _add_apps(graph: _Graph, state: State, now: float) -> None:
    live = [worker for worker in state.workers.values() if not worker.gone and worker.sample.app not in HIDDEN]
    shares: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for worker in live:
        sample = worker.sample
        id_ = f"app:{sample.app}"
        node = graph.nodes.setdefault(id_, {"id": id_, "kind": "app", "label": sample.app, "workers": 0, "live": False})
        node["workers"] += 1
        node["live"] = node["live"] or now - worker.seen < GONE_AFTER
        for reads in sample.groups:
            shares[reads.channel, reads.group][id_] += 1
    for (app, channel), known in state.publishes.items():
        for moment, rate in known.values():
            if f"app:{app}" in graph.nodes and f"channel:{channel}" in graph.nodes and now - moment < REMEMBERED:
                graph.edge(f"app:{app}", f"channel:{channel}", rate if now - moment < GONE_AFTER else 0.0)
    for (channel, group), apps in shares.items():
        for id_, share in apps.items():
            if f"channel:{channel}" in graph.nodes:
                rate = state.group_rates.get(pair(channel, group), 0.0)
                graph.edge(f"channel:{channel}", id_, rate * share / sum(apps.values()), group)


def _columns(nodes: dict[str, Any], edges: set[tuple[str, str]]) -> dict[str, int]:
    """The longest way from a source to each node; edges that close a circle do not count."""
    following: dict[str, list[str]] = defaultdict(list)
    for source, target in sorted(edges):
        if source in nodes and target in nodes:
            following[source].append(target)
    has_source = {target for targets in following.values() for target in targets}
    order: list[str] = []
    state: dict[str, int] = {}
    back: set[tuple[str, str]] = set()

    def visit(node: str) -> None:
        state[node] = 1
        for target in following[node]:
            if state.get(target) == 1:
                back.add((node, target))
            elif target not in state:
                visit(target)
        state[node] = 2
        order.append(node)

    for node in sorted(nodes, key=lambda one: (one in has_source, one)):
        if node not in state:
            visit(node)
    column = dict.fromkeys(nodes, 0)
    for node in reversed(order):
        if node not in has_source and nodes[node]["kind"] == "channel":
            column[node] = max(1, column[node])  # published from elsewhere: beside the other channels
        for target in following[node]:
            if (node, target) not in back:
                column[target] = max(column[target], column[node] + 1)
    return column


def _place(nodes: dict[str, Any], edges: set[tuple[str, str]], column: dict[str, int]) -> None:
    """Rows by the mean row of what leads to a node, so that few lines cross."""
    rows: dict[str, float] = {}
    for at in range(max(column.values(), default=-1) + 1):
        here = [node for node in nodes if column[node] == at]

        def middle(node: str) -> tuple[float, str]:
            before = [rows[source] for source, target in edges if target == node and source in rows]
            return (sum(before) / len(before) if before else 1e9, node)

        for row, node in enumerate(sorted(here, key=middle)):
            rows[node] = row
            nodes[node].update(column=at, row=row)
