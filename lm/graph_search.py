"""Random graphs to search: from a start vertex, which child leads to the goal?

The "balanced" distribution of Saparov et al., "Transformers Struggle to Learn to Search" (arXiv 2412.04703): the lookahead,
how many steps a breadth-first search needs to tell the right child from the others, is uniform from 0 to the stage's cap.
A stage of the curriculum, 1 .. max_lookahead, allows its share of the largest graph. The graph of example i is a function
of (seed, purpose, stage, attempt, i) alone.

    task = Task(max_input_size=96, max_lookahead=16)
    graphs = draw_graphs(task, seed=0, stage=16, indices=np.arange(512))
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm import draws, graph_kernels


class Limits(NamedTuple):
    """The largest graph of a stage; vertex ids run from 1 to `max_vertex_id`, lookaheads from 0 to `lookahead`."""

    max_edges: int
    max_vertices: int
    max_vertex_id: int
    lookahead: int


@dataclass(frozen=True)
class Task:
    """A graph-search task: at its last stage an edge list fills `max_input_size` tokens of the symbolic form.

    An edge takes three of those tokens, the query five, and vertex ids as many as there are edges at most.
    """

    max_input_size: int
    max_lookahead: int

    @property
    def largest_id(self) -> int:
        """The largest id of a vertex, which is also the most edges that `max_input_size` holds."""
        return (self.max_input_size - 5) // 3

    @property
    def reachable_lookahead(self) -> int:
        """The largest lookahead of the last stage: it takes two branches of that many vertices, and the start."""
        return self.limits(self.max_lookahead).lookahead

    def limits(self, stage: int) -> Limits:
        """What graphs of this stage, 1 .. max_lookahead, may have.

        Raises: ValueError if there is no such stage.
        """
        if not 1 <= stage <= self.max_lookahead:
            raise ValueError(f"stage {stage}, but a task of max_lookahead {self.max_lookahead} has 1 .. {self.max_lookahead}")
        max_edges = stage * self.largest_id // self.max_lookahead
        # The published generator takes max_edges + 1 also at full size, where that is the id of its path token.
        max_vertex_id = min(max_edges + 1, self.largest_id)
        lookahead = min((self.largest_id - 1) // 2, max_edges // 2, self.max_lookahead)
        return Limits(max_edges, min(max(4, max_edges), max_vertex_id), max_vertex_id, lookahead)

    def faults(self) -> list[str]:
        """What is wrong with the two sizes, a line for each fault; empty if nothing is."""
        n, wanted = self.max_input_size, self.max_lookahead
        if wanted < 1:
            return [f"--max_lookahead {wanted} is below 1: a search looks ahead at least one step"]
        if self.largest_id < 2:
            return [f"--max_input_size {n} holds no graph of two vertices, 11 are needed: pass {max(11, 6 * wanted)}"]
        reached = (self.largest_id - 1) // 2
        if reached < wanted - 2:
            return [
                f"--max_input_size {n} reaches a lookahead of {reached}, --max_lookahead {wanted} needs {wanted - 2}: "
                f"pass --max_input_size {6 * wanted} (6 x {wanted}) or more, or lower --max_lookahead"
            ]
        return []


class Graphs(NamedTuple):
    """A batch of graphs, the parts of graph i at offsets[i] : offsets[i + 1] of the flat arrays.

    Vertices are numbered from 0, the start, within each graph. `states` are the generators as the drawing left them.
    """

    edges: np.ndarray  # (all edges, 2) int32: source, target; in random order
    edge_offsets: np.ndarray  # (graphs + 1,) int64
    vertex_offsets: np.ndarray  # (graphs + 1,) int64
    vertex_ids: np.ndarray  # (all vertices,) int32: 1 .. max_vertex_id, no two alike in a graph
    lookahead: np.ndarray  # (graphs,) int32
    num_children: np.ndarray  # (graphs,) int32: of the start
    answers: np.ndarray  # (all answers,) int32: children of the start that lead to the goal; the label first
    answer_offsets: np.ndarray  # (graphs + 1,) int64
    states: np.ndarray  # (graphs, 4) uint64

    @property
    def goal(self) -> np.ndarray:
        """The goal of each graph."""
        return np.maximum(self.lookahead, 1)

    @property
    def label(self) -> np.ndarray:
        """The answer drawn, uniformly, among the right ones."""
        return self.answers[self.answer_offsets[:-1]]


def draw_graphs(task: Task, seed: int, stage: int, indices: np.ndarray, purpose: str = "train", attempt: int = 0) -> Graphs:
    """The graphs of these examples of a stage; graph i is the same whatever others are drawn with it."""
    states = generators(seed, f"graph_search/{purpose}/{stage}/{attempt}", indices)
    limits = task.limits(stage)
    drawn = graph_kernels.draw_graphs(states, limits.lookahead, limits.max_edges, limits.max_vertices, limits.max_vertex_id)
    return Graphs(*drawn, states)


def generators(seed: int, purpose: str, indices: np.ndarray) -> np.ndarray:
    """The state of a generator for each index, as (indices, 4) uint64; runs of consecutive indices cost one call each."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return np.concatenate([draws.integers(seed, purpose, int(run[0]), len(run)) for run in runs])
