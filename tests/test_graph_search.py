import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import lm.xoshiro
from lm import draws
from lm.graph_kernels import add_edge, attach_rest, make_room
from lm.graph_search import Limits, Task, draw_graphs, generators
from lm.xoshiro import KERNELS, below, cache_folder, random_bits

SMALL, MIDDLE, LARGE = Task(24, 4), Task(96, 16), Task(384, 64)
Z = 5.5  # standard errors; a two-sided chance of 4e-8, and the draws are the same in every run of the tests


@pytest.fixture(scope="module")
def full():
    """20,000 graphs of the last stage."""
    return draw_graphs(MIDDLE, 0, 16, np.arange(20_000))


@pytest.mark.parametrize("changed", KERNELS)
def test_functions_compiled_from_other_sources_are_never_taken(changed, tmp_path):
    for name in KERNELS:
        (tmp_path / name).write_text("x = 1\n")
    before = cache_folder(tmp_path)
    assert before == cache_folder(tmp_path)
    (tmp_path / changed).write_text("x = 2\n")
    assert cache_folder(tmp_path) != before


def test_every_file_of_compiled_functions_counts_for_the_cache():
    sources = Path(lm.xoshiro.__file__).parent
    assert {path.name for path in sources.glob("*.py") if "@compiled" in path.read_text()} == set(KERNELS)


def assert_uniform(counts):
    """Chi-square, by its normal approximation."""
    counts = np.asarray(counts, dtype=float)
    expected = counts.sum() / counts.size
    assert expected > 20
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    assert chi_square < freedom + Z * (2 * freedom) ** 0.5 + 10, f"{chi_square} with {freedom} degrees of freedom"


def unpack(graphs):
    """Of each graph: children of each vertex (a dict of lists), goal, lookahead, answers (a list, label first), vertices."""
    for i in range(len(graphs.lookahead)):
        children = {}
        for source, target in graphs.edges[graphs.edge_offsets[i] : graphs.edge_offsets[i + 1]].tolist():
            children.setdefault(source, []).append(target)
        answers = graphs.answers[graphs.answer_offsets[i] : graphs.answer_offsets[i + 1]].tolist()
        vertices = int(graphs.vertex_offsets[i + 1] - graphs.vertex_offsets[i])
        yield children, int(graphs.goal[i]), int(graphs.lookahead[i]), answers, vertices


def distances(children, start):
    """How far each vertex that can be reached is."""
    found, level = {start: 0}, [start]
    for depth in itertools.count(1):
        level = sorted({child for vertex in level for child in children.get(vertex, []) if child not in found})
        if not level:
            return found
        found |= dict.fromkeys(level, depth)


def lookahead(children, start, answer, goal):
    """The first depth at which all of the frontier is on the answer's branch, or just after which the goal is met.

    A vertex is at the depth it is first reached at, and on the answer's branch if a vertex of that branch, one depth
    above, leads to it.
    """
    depth = {child: 0 for child in children[start]}
    for vertex in depth_first_order(children, start):
        depth |= {child: min(depth.get(child, 999), depth[vertex] + 1) for child in children.get(vertex, [])}
    branch = {answer}
    for step in itertools.count():
        frontier = {vertex for vertex in depth if depth[vertex] == step}
        if frontier <= branch:
            return step
        if goal in frontier:
            return step + 1
        branch |= {c for v in branch & frontier for c in children.get(v, []) if depth[c] == step + 1}


def depth_first_order(children, start):
    """The vertices that `start` leads to, without itself, each after all its parents among them."""
    order, seen = [], set()

    def visit(vertex):
        seen.add(vertex)
        for child in children.get(vertex, []):
            if child not in seen:
                visit(child)
        order.append(vertex)

    visit(start)
    return order[-2::-1]


class Reference:
    """The published distribution, drawn slowly and in other data structures, from its description alone."""

    def __init__(self, limits, seed):
        self.limits, self.random = limits, random.Random(seed)

    def draw(self):
        """children, goal, lookahead, answers and vertices, as `unpack` gives them."""
        wanted = self.random.randint(0, self.limits.lookahead)
        while True:
            children, vertices = self.draw_graph(wanted)
            goal = max(1, wanted)
            reaching = [child for child in children[0] if goal in distances(children, child)]
            paths = self.shortest_paths(children, goal)
            if (
                sum(map(len, children.values())) <= self.limits.max_edges
                and len(paths) <= 64
                and any(lookahead(children, 0, path[1], goal) == wanted for path in paths)
            ):
                return children, goal, wanted, self.random.sample(reaching, len(reaching)), vertices

    def shortest_paths(self, children, goal):
        paths = [[0]]
        while not any(path[-1] == goal for path in paths):
            paths = [[*path, child] for path in paths for child in children.get(path[-1], [])]
        return [path for path in paths if path[-1] == goal]

    def draw_graph(self, wanted):
        integer, limits = self.random.randint, self.limits
        branches = integer(2, max(2, (limits.max_edges - 1) // wanted)) if wanted else 1
        size = min(wanted * branches + 1 + integer(0, 5), max(4, limits.max_edges), limits.max_edges + 1)
        size = max(2, size, 1 + branches * wanted)
        edges = [(v, v + 1) for v in range(max(1, wanted))]
        index = max(1, wanted) + 1
        for branch in range(branches - 1):
            edges.append((0, index))
            index += 1
            budget = max(0, size - index - (branches - branch - 1) * wanted + 2)
            extra = integer(0, min(2, budget) - 1) if budget else 0
            for _ in range(wanted + extra - 1):
                if index < size:
                    edges.append((index - 1, index))
                    index += 1
        head = 0
        for _ in range(integer(0, size - index)):
            edges.append((index, head))
            head, index = index, index + 1
        return self.as_lists(self.attach_rest(edges, index, size)), size

    def attach_rest(self, edges, first, size):
        out_degree, in_degree = Counter(a for a, _ in edges), Counter(b for _, b in edges)
        for vertex in range(first, size):
            num_children = self.random.randint(0, 3)
            num_parents = self.random.randint(0, 3) if num_children else self.random.randint(1, 3)
            for child in self.choose(range(vertex), in_degree, num_children):
                edges.append((vertex, child))
                in_degree[child] += 1
            below_it = distances(self.as_lists(edges), vertex)
            for parent in self.choose([v for v in range(vertex) if v not in below_it], out_degree, num_parents):
                edges.append((parent, vertex))
                out_degree[parent] += 1
        return edges

    def choose(self, among, degree, count):
        left, chosen = list(among), []
        while left and len(chosen) < count:
            chosen += self.random.choices(left, [0.5 + degree[vertex] for vertex in left])
            left.remove(chosen[-1])
        return chosen

    def as_lists(self, edges):
        children = {}
        for source, target in edges:
            children.setdefault(source, []).append(target)
        return children


def assert_same_means(ours, theirs):
    """Of each feature, given as a list of dicts."""
    differences = {}
    for name in ours[0]:
        one, two = (np.array([float(row[name]) for row in rows]) for rows in (ours, theirs))
        error = (one.var() / len(one) + two.var() / len(two)) ** 0.5
        differences[name] = (one.mean() - two.mean()) / error if error else one.mean() - two.mean()
    assert {name: z for name, z in differences.items() if abs(z) > Z} == {}


def degrees(edges, size):
    """How many edges lead out of and into each of the vertices."""
    out_degree, in_degree = Counter(a for a, _ in edges), Counter(b for _, b in edges)
    return {("out of", v): out_degree[v] for v in range(size)} | {("into", v): in_degree[v] for v in range(size)}


def features(graph):
    """What is compared between the two generators."""
    children, goal, wanted, answers, vertices = graph
    parents = Counter(child for below_it in children.values() for child in below_it)
    reached = distances(children, 0)
    return {
        "lookahead": wanted,
        "edges": parents.total(),
        "edges squared": parents.total() ** 2,
        "vertices": vertices,
        "answers": len(answers),
        "several answers": len(answers) > 1,
        "children of the start": len(children[0]),
        "chance": len(answers) / len(children[0]),
        "something before the start": parents[0] > 0,
        "parents of the start": parents[0],
        "reached from the start": len(reached),
        "furthest": max(reached.values()),
        "parents of the goal": parents[goal],
        "children of the goal": len(children.get(goal, [])),
        "most children": max(map(len, children.values())),
        "most parents": max(parents.values()),
        "vertices without children": vertices - len(children),
        "vertices without parents": vertices - len(parents),
        "degrees of the last vertex": parents[vertices - 1] + len(children.get(vertices - 1, [])),
        "parents squared": sum(count**2 for count in parents.values()),
        "children squared": sum(len(below_it) ** 2 for below_it in children.values()),
        "the label leads there fastest": distances(children, answers[0])[goal] == reached[goal] - 1,
    }


@pytest.mark.parametrize(
    ("task", "stage", "samples"), [(SMALL, 4, 6000), (MIDDLE, 5, 6000), (MIDDLE, 16, 5000), (LARGE, 64, 500)]
)
def test_graphs_have_the_distribution_of_a_slow_generator_written_from_the_description(task, stage, samples):
    reference = Reference(task.limits(stage), seed=0)
    ours = [features(graph) for graph in unpack(draw_graphs(task, 3, stage, np.arange(2 * samples)))]
    theirs = [features(reference.draw()) for _ in range(samples)]
    assert_same_means(ours, theirs)


def test_later_vertices_attach_by_the_edges_that_vertices_before_them_were_chosen_for():
    """With many more of them than graphs have, so that what they count as a degree shows."""
    reference, size, samples = Reference(None, seed=0), 16, 2000
    theirs = [degrees(reference.attach_rest([(0, 1)], 2, size), size) for _ in range(samples)]
    ours, states = [], generators(0, "test", np.arange(2 * samples))
    for state in states:
        graph, scratch = make_room(6 * size, size)
        add_edge(graph, 0, 1)
        assert attach_rest(graph, scratch, state, 2, size)
        ours.append(degrees(graph.ends[:, : graph.num_edges[0]].T.tolist(), size))
    assert_same_means(ours, theirs)


@pytest.mark.parametrize(
    ("task", "stage"), [*((MIDDLE, stage) for stage in range(1, 17)), *((LARGE, s) for s in (2, 17, 40, 64))]
)
def test_every_graph_is_acyclic_within_the_stages_limits_and_has_its_lookahead(task, stage):
    graphs, limits = draw_graphs(task, 1, stage, np.arange(300)), task.limits(stage)
    ids = np.split(graphs.vertex_ids, graphs.vertex_offsets[1:-1])
    for i, (children, goal, wanted, answers, vertices) in enumerate(unpack(graphs)):
        edges = [(source, target) for source, below_it in children.items() for target in below_it]
        assert len(set(edges)) == len(edges) <= limits.max_edges <= (task.max_input_size - 5) // 3
        assert {v for edge in edges for v in edge} == set(range(vertices)), "every vertex is on an edge"
        assert len(set(ids[i].tolist())) == vertices
        assert ids[i].min() >= 1
        assert ids[i].max() <= limits.max_vertex_id
        assert all(vertex not in distances(children, child) for vertex, child in edges), "a cycle"
        reached = distances(children, 0)
        assert reached[goal] == goal == max(1, wanted)
        assert 0 <= wanted <= limits.lookahead
        assert sorted(answers) == sorted(child for child in children[0] if goal in distances(children, child))
        shortest = [child for child in children[0] if distances(children, child).get(goal) == goal - 1]
        assert max(lookahead(children, 0, child, goal) for child in shortest) == wanted
        assert graphs.num_children[i] == len(children[0])


def test_limits_are_the_stages_share_of_the_largest_graph():
    assert [MIDDLE.limits(stage) for stage in (1, 2, 8, 15, 16)] == [
        Limits(max_edges=1, max_vertices=2, max_vertex_id=2, lookahead=0),
        Limits(max_edges=3, max_vertices=4, max_vertex_id=4, lookahead=1),
        Limits(max_edges=15, max_vertices=15, max_vertex_id=16, lookahead=7),
        Limits(max_edges=28, max_vertices=28, max_vertex_id=29, lookahead=14),
        Limits(max_edges=30, max_vertices=30, max_vertex_id=30, lookahead=14),
    ]
    assert LARGE.limits(64) == Limits(max_edges=126, max_vertices=126, max_vertex_id=126, lookahead=62)
    assert [Task(6 * L, L).reachable_lookahead for L in (2, 3, 16, 64, 256)] == [0, 1, 14, 62, 254]
    assert Task(2000, 16).limits(16).lookahead == 16, "a larger graph does not raise the lookahead asked for"
    assert [Task(6 * L, L).limits(1).max_edges for L in (2, 5, 64)] == [1, 1, 1]
    for stage in (0, 17):
        with pytest.raises(ValueError, match=f"stage {stage}, but a task of max_lookahead 16 has 1 .. 16"):
            MIDDLE.limits(stage)


def test_smallest_tasks_give_graphs():
    for task in (Task(11, 1), Task(12, 2), Task(14, 2), Task(18, 3)):
        assert task.faults() == []
        for stage in range(1, task.max_lookahead + 1):
            graphs = draw_graphs(task, 0, stage, np.arange(500))
            assert graphs.vertex_ids.max() <= task.limits(stage).max_vertex_id
            assert np.diff(graphs.edge_offsets).max() <= task.limits(stage).max_edges


def test_faults_of_a_task_say_what_to_pass():
    assert Task(96, 0).faults() == ["--max_lookahead 0 is below 1: a search looks ahead at least one step"]
    assert Task(10, 1).faults() == ["--max_input_size 10 holds no graph of two vertices, 11 are needed: pass 11"]
    assert Task(80, 16).faults() == [
        "--max_input_size 80 reaches a lookahead of 12, --max_lookahead 16 needs 14: "
        "pass --max_input_size 96 (6 x 16) or more, or lower --max_lookahead"
    ]
    assert Task(96, 16).faults() == Task(92, 16).faults() == []


@pytest.mark.parametrize(("task", "stage", "cap"), [(SMALL, 4, 2), (MIDDLE, 7, 6), (MIDDLE, 16, 14), (LARGE, 64, 62)])
def test_lookaheads_are_uniform_up_to_the_stages_cap(task, stage, cap):
    found = draw_graphs(task, 0, stage, np.arange(30_000)).lookahead
    assert_uniform(np.bincount(found, minlength=cap + 1))
    assert found.max() == cap


def test_lookaheads_of_neighbouring_examples_have_nothing_to_do_with_each_other(full):
    centred = full.lookahead - full.lookahead.mean()
    correlations = [np.dot(centred[lag:], centred[:-lag]) / np.dot(centred, centred) for lag in range(1, 1001)]
    assert np.abs(correlations).max() < Z / len(centred) ** 0.5


def test_vertex_ids_are_uniform_and_unlike_the_order_of_vertices(full):
    assert_uniform(np.bincount(full.vertex_ids, minlength=31)[1:])
    assert_uniform(np.bincount(full.vertex_ids[full.vertex_offsets[:-1]], minlength=31)[1:])
    partial = draw_graphs(MIDDLE, 0, 8, np.arange(5000))
    assert_uniform(np.bincount(partial.vertex_ids, minlength=17)[1:])


def test_label_is_uniform_among_the_answers():
    graphs = draw_graphs(MIDDLE, 0, 16, np.arange(60_000))
    for count in (2, 3):
        rows = np.flatnonzero(np.diff(graphs.answer_offsets) == count)
        answers = graphs.answers[graphs.answer_offsets[rows][:, None] + np.arange(count)]
        assert np.array_equal(answers[:, 0], graphs.label[rows])
        assert_uniform(np.bincount((answers < answers[:, :1]).sum(axis=1), minlength=count))


def test_edges_are_in_random_order():
    graphs = draw_graphs(SMALL, 0, 4, np.arange(20_000))
    orders = Counter(
        tuple(np.lexsort(edges.T).tolist()) for edges in np.split(graphs.edges, graphs.edge_offsets[1:-1]) if len(edges) == 4
    )
    assert len(orders) == 24
    assert_uniform(list(orders.values()))


@pytest.mark.parametrize(("task", "low", "high"), [(MIDDLE, 0.38, 0.46), (LARGE, 0.35, 0.42)])
def test_guessing_a_child_of_the_start_is_right_for_two_examples_in_five(task, low, high):
    graphs = draw_graphs(task, 0, task.max_lookahead, np.arange(5000))
    assert low < (np.diff(graphs.answer_offsets) / graphs.num_children).mean() < high


def test_a_graph_is_the_same_whatever_is_drawn_with_it():
    whole = list(unpack(draw_graphs(MIDDLE, 7, 16, np.arange(1000, 1100))))
    chosen = np.array([1003, 1004, 1050, 1051, 1001])
    assert list(unpack(draw_graphs(MIDDLE, 7, 16, chosen))) == [whole[i - 1000] for i in chosen]
    ids = draw_graphs(MIDDLE, 7, 16, np.array([1050])).vertex_ids
    batch = draw_graphs(MIDDLE, 7, 16, np.arange(1000, 1100))
    assert np.array_equal(ids, batch.vertex_ids[batch.vertex_offsets[50] : batch.vertex_offsets[51]])


def test_another_seed_stage_purpose_or_attempt_gives_other_graphs():
    arguments = [(0, 16, "train", 0), (1, 16, "train", 0), (0, 15, "train", 0), (0, 16, "test", 0), (0, 16, "train", 1)]
    drawn = [draw_graphs(MIDDLE, seed, stage, np.arange(50), *rest) for seed, stage, *rest in arguments]
    for one, two in itertools.combinations(drawn, 2):
        assert np.sum(one.lookahead == two.lookahead) < 20


def test_generators_are_those_of_draws_for_any_indices():
    indices = np.array([5, 6, 7, 2, 9, 10])
    assert np.array_equal(generators(3, "x", indices), draws.integers(3, "x", 0, 11)[indices])


def test_random_bits_are_those_of_xoshiro256plusplus():
    state = np.array([1, 2, 3, 4], dtype=np.uint64)  # the first outputs of Blackman and Vigna's own program from there
    assert [int(random_bits(state)) for _ in range(6)] == [
        41943041,
        58720359,
        3588806011781223,
        3591011842654386,
        9228616714210784205,
        9973669472204895162,
    ]


def test_bounded_integers_have_no_bias():
    state = draws.integers(0, "test", 0, 1)[0]
    drawn = np.array([below(state, 3 << 30) for _ in range(20_000)])
    assert_uniform(np.bincount(drawn % 3))  # multiplying and cutting alone gives (1/2, 1/4, 1/4)
    for bound in (1, 2, 7):
        assert_uniform(np.bincount([below(state, bound) for _ in range(5000)], minlength=bound))
