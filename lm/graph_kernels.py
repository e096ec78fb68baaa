"""The compiled loops that draw graphs to search: see lm.graph_search for what they draw.

Each example has its own generator and starts from nothing that another left behind, so that it does not depend on the
batch it is drawn in.
"""

from typing import NamedTuple

import numpy as np

from lm.xoshiro import below, compiled

SHORTEST_PATHS = 64  # a graph with more of them is drawn anew


class Graph(NamedTuple):
    """A graph being drawn, as two linked lists: row 0 of each array is about sources of edges, row 1 about targets.

    `ends` (2, max_edges) are the edges. `heads` (2, vertices) holds the last edge out of (into) a vertex and `links`
    (2, max_edges) the edge before it, -1 at the end. `weights` (2, vertices) are the degrees by which later vertices choose.
    """

    ends: np.ndarray
    links: np.ndarray
    heads: np.ndarray
    weights: np.ndarray
    num_edges: np.ndarray


class Scratch(NamedTuple):
    """Room for the searches, one entry for each vertex."""

    queue: np.ndarray
    depth: np.ndarray
    paths: np.ndarray
    flag: np.ndarray


@compiled
def make_room(max_edges, max_vertices):
    """A graph without edges, and scratch room, for so many edges and vertices."""
    ends, links = np.empty((2, max_edges), np.int64), np.empty((2, max_edges), np.int64)
    heads, weights = np.full((2, max_vertices), -1), np.zeros((2, max_vertices), np.int64)
    lists = np.empty((3, max_vertices), np.int64)
    scratch = Scratch(lists[0], lists[1], lists[2], np.empty(max_vertices, np.bool_))
    return Graph(ends, links, heads, weights, np.zeros(1, np.int64)), scratch


@compiled
def add_edge(graph, source, target):
    """Append an edge, which counts for the weights of both its ends."""
    edge = graph.num_edges[0]
    graph.num_edges[0] = edge + 1
    for side, vertex in ((0, source), (1, target)):
        graph.ends[side, edge] = vertex
        graph.links[side, edge] = graph.heads[side, vertex]
        graph.heads[side, vertex] = edge
        graph.weights[side, vertex] += 1


@compiled
def _draw_chains(graph, state, lookahead, branches, num_vertices):
    """Vertex 0, the chain to the goal, the other branches and the chain before 0; returns the first vertex left over."""
    free = max(1, lookahead) + 1
    for vertex in range(1, free):
        add_edge(graph, vertex - 1, vertex)
    spare = num_vertices - 1 - branches * lookahead
    for _ in range(branches - 1):
        extra = below(state, 2) if spare > 0 else 0
        spare -= extra
        parent = 0
        for _ in range(lookahead + extra):
            add_edge(graph, parent, free)
            parent = free
            free += 1
    first = 0
    for _ in range(below(state, num_vertices - free + 1)):
        add_edge(graph, free, first)
        first = free
        free += 1
    return free


@compiled
def _attach(graph, state, vertex, side, wanted, barred):
    """Give `vertex` children (side 1) or parents (side 0) among the vertices before it; False when edges run out.

    They are drawn without replacement, by 0.5 + degree on that side, from those not barred (which this changes).
    """
    available, total = 0, 0
    for other in range(vertex):
        if not barred[other]:
            available += 1
            total += 1 + 2 * graph.weights[side, other]
    for _ in range(min(wanted, available)):
        if graph.num_edges[0] == graph.ends.shape[1]:
            return False
        left, other = below(state, total), -1
        while left >= 0:
            other += 1
            if not barred[other]:
                left -= 1 + 2 * graph.weights[side, other]
        total -= 1 + 2 * graph.weights[side, other]
        barred[other] = True
        if side == 1:
            add_edge(graph, vertex, other)
        else:
            add_edge(graph, other, vertex)
    return True


@compiled
def _bar_descendants(graph, vertex, queue, barred):
    queue[0], end, at = vertex, 1, 0
    while at < end:
        edge = graph.heads[0, queue[at]]
        while edge >= 0:
            child = graph.ends[1, edge]
            if not barred[child]:
                barred[child] = True
                queue[end] = child
                end += 1
            edge = graph.links[0, edge]
        at += 1


@compiled
def attach_rest(graph, scratch, state, first, num_vertices):
    """Add the vertices from `first` on, each with random children and parents; False when edges run out."""
    for vertex in range(first, num_vertices):
        num_children = below(state, 4)
        num_parents = below(state, 4) if num_children else 1 + below(state, 3)
        scratch.flag[:vertex] = False
        if not _attach(graph, state, vertex, 1, num_children, scratch.flag):
            return False
        scratch.flag[:vertex] = False
        _bar_descendants(graph, vertex, scratch.queue, scratch.flag)
        if not _attach(graph, state, vertex, 0, num_parents, scratch.flag):
            return False
        graph.weights[:, vertex] = 0  # a vertex counts only the edges that later vertices choose
    return True


@compiled
def _measure_distances(graph, scratch, goal, num_vertices):
    """Set depth[v], v's distance to the goal (-1: none), and paths[v], how many shortest paths (65: more than 64)."""
    scratch.depth[:num_vertices] = -1
    scratch.depth[goal], scratch.paths[goal] = 0, 1
    scratch.queue[0], end, at = goal, 1, 0
    while at < end:
        vertex = scratch.queue[at]
        edge = graph.heads[1, vertex]
        while edge >= 0:
            parent = graph.ends[0, edge]
            if scratch.depth[parent] < 0:
                scratch.depth[parent] = scratch.depth[vertex] + 1
                scratch.paths[parent] = 0
                scratch.queue[end] = parent
                end += 1
            if scratch.depth[parent] == scratch.depth[vertex] + 1:
                scratch.paths[parent] = min(scratch.paths[parent] + scratch.paths[vertex], SHORTEST_PATHS + 1)
            edge = graph.links[1, edge]
        at += 1


@compiled
def _measure_lookahead(graph, scratch, following, goal, num_vertices):
    """How deep a breadth-first search from 0's children must look to know that `following` leads to the goal.

    The search ends when all it stands on was reached through `following`, or at the goal.
    """
    queue, depth, right = scratch.queue, scratch.depth, scratch.flag
    depth[:num_vertices] = -1
    begin, end, lookahead = 0, 0, 0
    edge = graph.heads[0, 0]
    while edge >= 0:
        queue[end] = graph.ends[1, edge]
        depth[queue[end]], right[queue[end]] = 0, queue[end] == following
        end += 1
        edge = graph.links[0, edge]
    while True:
        all_right, at_goal = True, False
        for at in range(begin, end):
            all_right &= right[queue[at]]
            at_goal |= queue[at] == goal
        if all_right:
            return lookahead
        lookahead += 1
        if at_goal:
            return lookahead
        begin, end = end, _step(graph, scratch, begin, end, lookahead)


@compiled
def _step(graph, scratch, begin, end, lookahead):
    """Append to the queue what its part begin .. end reaches anew; returns the queue's new end."""
    new_end = end
    for at in range(begin, end):
        vertex = scratch.queue[at]
        edge = graph.heads[0, vertex]
        while edge >= 0:
            child = graph.ends[1, edge]
            if scratch.depth[child] < 0:
                scratch.depth[child], scratch.flag[child] = lookahead, scratch.flag[vertex]
                scratch.queue[new_end] = child
                new_end += 1
            elif scratch.flag[vertex] and scratch.depth[child] == lookahead:
                scratch.flag[child] = True
            edge = graph.links[0, edge]
    return new_end


@compiled
def _find_answers(graph, scratch, lookahead, num_vertices, answers):
    """Write 0's children that lead to the goal to `answers`; returns how many, or 0 when the graph is to be refused."""
    goal = max(1, lookahead)
    _measure_distances(graph, scratch, goal, num_vertices)
    if scratch.paths[0] > SHORTEST_PATHS:
        return 0
    count, shortest, distance = 0, 0, scratch.depth[0]
    edge = graph.heads[0, 0]
    while edge >= 0:
        child = graph.ends[1, edge]
        if scratch.depth[child] >= 0:
            answers[count] = child
            if scratch.depth[child] == distance - 1:  # in front: those on a shortest path
                answers[count], answers[shortest] = answers[shortest], child
                shortest += 1
            count += 1
        edge = graph.links[0, edge]
    for i in range(shortest):
        if _measure_lookahead(graph, scratch, answers[i], goal, num_vertices) == lookahead:
            return count
    return 0


@compiled
def _draw_graph(graph, scratch, state, lookahead, max_edges, max_vertices, answers):
    """Draw graphs until one has this lookahead and at most `max_edges` edges; returns its vertices and its answers."""
    while True:
        graph.heads.fill(-1)
        graph.weights.fill(0)
        graph.num_edges[0] = 0
        branches = 1
        if lookahead:
            branches = 2 + below(state, max(2, (max_edges - 1) // lookahead) - 1)
        num_vertices = min(lookahead * branches + 1 + below(state, 6), max_vertices)
        num_vertices = max(2, num_vertices, lookahead * branches + 1)
        first = _draw_chains(graph, state, lookahead, branches, num_vertices)
        if attach_rest(graph, scratch, state, first, num_vertices):
            num_answers = _find_answers(graph, scratch, lookahead, num_vertices, answers)
            if num_answers:
                return num_vertices, num_answers


@compiled
def _shuffle_edges(graph, state, edges):
    """Write the graph's edges to `edges`, in uniformly random order."""
    for j in range(graph.num_edges[0]):
        k = below(state, j + 1)
        edges[j, 0], edges[j, 1] = edges[k, 0], edges[k, 1]
        edges[k, 0], edges[k, 1] = graph.ends[0, j], graph.ends[1, j]


@compiled
def _draw_ids(state, ids, num_vertices, max_vertex_id):
    """Write a uniformly random choice of 1 .. max_vertex_id, in random order, to the first `num_vertices` ids."""
    for j in range(max_vertex_id):
        ids[j] = j + 1
    for j in range(num_vertices):
        k = j + below(state, max_vertex_id - j)
        ids[j], ids[k] = ids[k], ids[j]


@compiled
def draw_graphs(states, cap, max_edges, max_vertices, max_vertex_id):
    """One graph for each generator, as lm.graph_search.Graphs describes it: its fields but the last, in their order."""
    count = len(states)
    graph, scratch = make_room(max_edges, max_vertex_id)
    edges, answers = np.empty((count * max_edges, 2), np.int32), np.empty(count * max_edges, np.int32)
    ids = np.empty(count * max_vertex_id, np.int32)
    offsets = np.zeros((3, count + 1), np.int64)
    lookaheads, num_children = np.empty(count, np.int32), np.empty(count, np.int32)
    for i in range(count):
        state = states[i]
        edge, vertex, answer = offsets[0, i], offsets[1, i], offsets[2, i]
        lookaheads[i] = below(state, cap + 1)
        num_vertices, num_answers = _draw_graph(graph, scratch, state, lookaheads[i], max_edges, max_vertices, answers[answer:])
        label = answer + below(state, num_answers)
        answers[answer], answers[label] = answers[label], answers[answer]
        _shuffle_edges(graph, state, edges[edge:])
        _draw_ids(state, ids[vertex:], num_vertices, max_vertex_id)
        num_edges = graph.num_edges[0]
        num_children[i] = np.sum(graph.ends[0, :num_edges] == 0)
        offsets[0, i + 1], offsets[1, i + 1], offsets[2, i + 1] = edge + num_edges, vertex + num_vertices, answer + num_answers
    edges, ids, answers = edges[: offsets[0, -1]].copy(), ids[: offsets[1, -1]].copy(), answers[: offsets[2, -1]].copy()
    return edges, offsets[0], offsets[1], ids, lookaheads, num_children, answers, offsets[2]
