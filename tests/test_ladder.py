"""Ladders: what is planned, and that it is run once, whole, and goes on after a stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from packs import SEQ_LEN, publish, write_pack
from text import byte_level_bpe, documents
from training import ROOT, events, kill, wait_for_step

import ladder
import pretrain
from lm.args import parse
from lm.decisions import decision_table
from lm.files import read_json, read_jsonl
from lm.ladder_plan import Cell, count, find_recipes, make_plan, rows_of_plan, too_short
from lm.ladder_results import read_results
from lm.ladder_run import Runner, is_done
from lm.presets import PRESETS
from lm.trainer_args import setup_of

TOKENIZER = byte_level_bpe()
TINY = [
    "--",
    "--micro_batch=4",
    "--precision=fp32",
    "--eval_every=10",
    "--eval_blocks=4",
    "--force_cpu",
    "--dirty",
    "--checkpoint_interval_steps=5",
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Two packs of different text; not to be changed."""
    folder = tmp_path_factory.mktemp("recipes")
    write_pack(folder / "python", TOKENIZER)
    write_pack(folder / "other", TOKENIZER, source={"documents": "others"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "held.jsonl"
    file.write_text("".join(json.dumps({"text": part}) + "\n" for part in documents()[-3:]))
    return file


def arguments(command, recipes, folder, **changes):
    options = {"sizes": "neox-64x2", "recipes": recipes, "ladder": folder, "seeds": 2, "tokens": 192 * 8 * 12, "batch": 8}
    return [command, *(f"--{key}={value}" for key, value in (options | changes).items()), *TINY]


def cells_of(recipes, folder, sizes=("neox-64x2",), **changes):
    return make_plan(find_recipes(recipes), sizes, 2, folder, **{"tokens": 192 * 8 * 12, "batch": 8} | changes)


def start(arguments, out):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(out, "a") as file:
        command = [sys.executable, ROOT / "ladder.py", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def test_a_rung_of_the_published_vocabulary_has_the_published_settings(tmp_path):
    import torch

    pack = write_pack(tmp_path / "recipes/neox", TOKENIZER, vocab_size=50_280)
    (found,) = find_recipes(pack.parent).values()
    found.seq_len = 2048  # only its numbers count
    cells = make_plan({"neox": found}, ("4M", "90M", "300M", "530M"), 1, tmp_path)
    for cell in cells:
        preset = PRESETS[cell.model]
        assert (cell.parameters, cell.batch, f"{cell.lr:.1e}") == (preset.parameters, preset.batch, f"{preset.lr:.1e}")
        assert preset.steps - cell.steps in range(10, 22), "the published ones are some 11 to 21 longer"
        assert abs(cell.warmup_steps - cell.steps / 100) < 1, "a token for each parameter, of a hundred"
        assert cell.vocab_rows == 50_304
        assert cell.flops == 6.0 * cell.parameters * cell.steps * cell.batch * 2048
    assert cells[0].hours(peak_tflops=100, mfu=0.5) == cells[0].flops / 50e12 / 3600
    with torch.device("meta"):
        assert cells[0].all_parameters == cells[0].parameters + 50_304 * 64


def test_a_plan_has_every_recipe_at_every_size_with_every_seed_the_smallest_first(recipes, tmp_path):
    cells = cells_of(recipes, tmp_path, ("neox-128x2", "neox-64x2"))
    assert [cell.name for cell in cells] == [
        f"{recipe}/{size}/seed{seed}"
        for size in ("neox-64x2", "neox-128x2")
        for recipe in ("other", "python")
        for seed in (0, 1)
    ]
    assert [cell.folder for cell in cells] == [tmp_path / cell.name for cell in cells]
    assert {(cell.steps, cell.tokens, cell.warmup_steps) for cell in cells} == {(12, 192 * 8 * 12, 1)}
    table = rows_of_plan(cells, 100.0, 0.5)
    assert [row[:2] for row in table[1:]] == [["neox-64x2", "4"], ["neox-128x2", "4"], ["all", "8"]]
    assert table[-1][7] == f"{8 * 192 * 8 * 12:,}"
    assert table[-1][8] == f"{sum(cell.flops for cell in cells):.3g}"
    hours = [cell.hours(100.0, 0.5) for cell in cells]
    assert [row[9] for row in table[1:]] == [f"{hours[0]:.3g}", f"{hours[-1]:.3g}", ""]
    assert [row[10] for row in table[1:]] == [f"{4 * hours[0]:.3g}", f"{4 * hours[-1]:.3g}", f"{sum(hours):.3g}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ("5M",)}, r"--sizes 5M is no rung \(4M, 6M, .*1B\) and no preset"),
        ({"tokens": 99}, r"neox-64x2 would train for less than a step of 8 rows"),
    ],
)
def test_what_cannot_be_planned_is_said(changes, message, recipes, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        cells_of(recipes, tmp_path, **changes)
    assert len(str(refused.value).splitlines()) == 1, "once, though every recipe and seed has it"


def test_a_plan_is_shown_that_recipes_are_too_short_for_and_not_run(recipes, tmp_path, capsys):
    long = {"sizes": "neox-64x2,neox-128x2,neox-64x2", "tokens": 10**6, "tokens_per_parameter": 1}
    plan = arguments("plan", recipes, tmp_path, **long)[: -len(TINY)]
    assert ladder.main(plan) == 1
    table, said = capsys.readouterr().out.split("plan.json\n")
    assert "neox-128x2" in table
    needed = [line.split(":")[0] for line in said.splitlines()]
    assert needed == [f"{name} at neox-64x2 needs 5,208 blocks, {recipes}/{name} has 284" for name in ("other", "python")]
    with pytest.raises(ValueError, match="python at neox-64x2 needs 5,208 blocks"):
        ladder.main(arguments("run", recipes, tmp_path, **long))
    assert ladder.main([*plan, "--allow_epochs"]) == 0
    assert len(read_json(tmp_path / "plan.json", "")) == 2 * 2 * 2


def test_a_recipe_is_too_short_if_its_longest_run_needs_a_block_more_than_there_are(recipes, tmp_path):
    packs, sizes = find_recipes(recipes, ["python"]), ("neox-64x2", "neox-128x2")
    small, large = (count(size, 300, SEQ_LEN)[0] for size in sizes)

    def missing(num_blocks):
        return too_short(packs, make_plan(packs, sizes, 1, tmp_path, SEQ_LEN * num_blocks / large, batch=1))

    assert packs["python"].num_blocks == 284
    assert missing(284) == []
    (said,) = missing(285)
    assert said.startswith("python at neox-128x2 needs 285 blocks, ")
    assert small < large


def test_recipes_of_other_block_lengths_or_names_are_refused(recipes, tmp_path):
    write_pack(tmp_path / "recipes/a", TOKENIZER)
    write_pack(tmp_path / "recipes/b", TOKENIZER, seq_len=96)
    with pytest.raises(ValueError, match=r"not of one tokenizer and block length \(a: .*blocks of 192; b: .*blocks of 96\)"):
        find_recipes(tmp_path / "recipes")
    assert list(find_recipes(tmp_path / "recipes", ["b"])) == ["b"]
    with pytest.raises(FileNotFoundError, match=r"no recipe c in .*found: a, b\): make it with build_pretrain.py"):
        find_recipes(tmp_path / "recipes", ["b", "c"])
    another = byte_level_bpe(len(TOKENIZER) - 1)
    another.add_tokens(["another"])
    write_pack(tmp_path / "recipes/c", another)
    with pytest.raises(ValueError, match=r"not of one tokenizer .*, 300 ids, blocks of 192; c: .*, 300 ids, blocks of 192\)"):
        find_recipes(tmp_path / "recipes", ["a", "c"])
    with pytest.raises(FileNotFoundError, match="no packs in"):
        find_recipes(tmp_path / "nothing")


def test_what_is_run_for_a_cell_is_its_own_training_and_every_measurement(recipes, text, tmp_path):
    options = {"sizes": "neox-64x2", "recipes": recipes, "ladder": tmp_path, "tasks": "piqa,sciq", "rows": text.parent}
    options |= {"limit": 3, "num_fewshot": 5, "texts": (f"held={text}",), "further": ("--dirty", "--micro_batch=4")}
    for one in cells_of(recipes, tmp_path, tokens=192 * 8 * 30):
        train, tasks, of_text = ladder.commands(ladder.Run(**options), one)
        assert train[:2] == [sys.executable, str(ROOT / "pretrain.py")]
        args = parse(pretrain.Args, train[2:])
        assert (args.c4_dir, args.output_dir, args.model) == (str(recipes / one.recipe), str(one.folder), "neox-64x2")
        assert (args.seed, args.shuffle, args.pptrain_checkpoint) == (one.seed, True, "none")
        assert (args.lr, args.effective_batch, args.warmup_steps, args.total_steps) == (one.lr, 8, 3, 30)
        assert (args.schedule, args.min_lr_ratio, args.weight_decay, args.decay) == ("cosine", 0.01, 0.05, "all")
        assert (args.adam_beta1, args.adam_beta2, args.adam_eps, args.max_grad_norm) == (0.9, 0.95, 1e-8, 1.0)
        assert (args.dirty, args.micro_batch, args.allow_epochs, args.sample_every) == (True, 4, False, 0)
        measure = [sys.executable, str(ROOT / "evaluate_model.py")]
        asked = ["--tasks=piqa,sciq", f"--rows={text.parent}", "--limit=3", "--num_fewshot=5"]
        assert tasks == [*measure, "tasks", str(one.folder), *asked]
        assert of_text == [*measure, "text", str(one.folder), f"--documents={text}", "--name=held"]
    (train,) = ladder.commands(ladder.Run(sizes="neox-64x2", allow_epochs=True, processes_per_run=2), one)
    assert train[1:3] == [str(ROOT / "scripts/launch_on_node.py"), str(ROOT / "pretrain.py")]
    assert parse(pretrain.Args, train[3:]).allow_epochs


def test_each_run_has_gpus_of_its_own_or_shares_one_if_its_memory_allows_it(recipes, tmp_path, monkeypatch):
    cells = cells_of(recipes, tmp_path, ("neox-64x2", "neox-128x2"))
    setup = setup_of(pretrain.Args(scratch_dir="S", micro_batch=4), SEQ_LEN, 1, torch.device("cpu"), device_bytes=1.0)
    least = 2 * cells[-1].memory(setup)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=least))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpus(micro_batch=4, **changes):
        args = ladder.Run(sizes="neox-64x2", further=("--micro_batch", str(micro_batch)), **changes)
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in ladder.slots(args, cells)]

    assert gpus() == ["0", "1", "2", "3", "4"]
    assert gpus(processes_per_run=2) == ["0,1", "2,3"]
    assert gpus(gpus="7,4", per_gpu=2) == ["7", "7", "4", "4"]
    for changes in ({"per_gpu": 3}, {"per_gpu": 2, "micro_batch": 5}, {"per_gpu": 3, "micro_batch": "auto"}):
        with pytest.raises(ValueError, match=rf"--per_gpu {changes['per_gpu']} runs of neox-128x2 need about"):
            gpus(**changes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpus() == gpus("auto") == ["3", "1"]
    with pytest.raises(ValueError, match="--processes_per_run 3, but there are 2 GPUs"):
        gpus(processes_per_run=3)


@pytest.mark.slow
def test_a_stopped_ladder_goes_on_and_does_nothing_twice(recipes, text, tmp_path):
    folder, steps = tmp_path / "ladder", 150  # enough that no run ends between the look at its log and the signal
    options = {"tokens": 192 * 8 * steps, "seeds": 1, "workers": 2, "processes_per_run": 2, "texts": f"held={text}"}
    own = arguments("run", recipes, folder, **options)
    own.insert(1, "--allow_epochs")
    cells = [cell for cell in cells_of(recipes, folder, tokens=options["tokens"]) if cell.seed == 0]
    process = start(own, tmp_path / "out")
    try:
        for cell in cells:
            wait_for_step(cell.folder, 20, process, tmp_path / "out", seconds=120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75, (tmp_path / "out").read_text()
    finally:
        kill(process)
    assert not list(folder.rglob("cell.json"))
    process = start(own, tmp_path / "out")
    try:
        assert process.wait(timeout=300) == 0, (tmp_path / "out").read_text()
    finally:
        kill(process)
    for cell in cells:
        assert read_json(cell.folder / "final/about.json", "")["step"] == steps
        assert [row["step"] for row in read_jsonl(cell.folder / "logs/train.jsonl", "")] == [*range(10, steps + 1, 10)]
        assert 0 < read_json(cell.folder / "evaluation/final_text_held.json", "")["loss"] < 7
        assert (cell.folder / "cell.json").is_file()
        assert [event["event"] for event in events(cell.folder)] == ["started", "stopped", "resumed", "finished"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert ladder.main(own) == 0
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in after if after[path] != before.get(path)] == ["plan.json"]
    plan = read_json(folder / "plan.json", "")
    assert [row["name"] for row in plan] == [cell.name for cell in cells]


def cell(name, folder):
    return Cell(name, "s", 0, folder, folder / name, "neox-64x2", 1, 1, 0.1, 8, 1, 12, 192, 300)


def test_a_failing_cell_is_named_and_stops_no_other(tmp_path):
    said, python = [], [sys.executable, "-c"]
    codes = {"a": "os.getsid(0) != os.getpid()", "b": 3, "c": 0}  # Ctrl-C in a terminal is to reach the ladder alone
    work = [(cell(name, tmp_path), [[*python, f"import os; raise SystemExit({code})"]]) for name, code in codes.items()]
    work[1][1].append([*python, f"open({str(tmp_path / 'after')!r}, 'w')"])
    work.insert(2, (cell("no_program", tmp_path), [[str(tmp_path / "nothing")]]))
    assert Runner([{}], said.append).run(work) == 1
    assert said[-1] == "failed: b/s/seed0, no_program/s/seed0; see their .log, then run the same command again"
    assert any(line.startswith("exit code 3, see ") for line in said)
    assert any(line.startswith("failed ([Errno 2] No such file") for line in said)
    assert not (tmp_path / "after").exists(), "a failed command is the last of its cell"
    assert [is_done(*one) for one in work] == [True, False, False, True]
    assert not is_done(work[0][0], [["another", "command"]])


def test_a_slot_is_never_shared_by_two_cells(tmp_path, monkeypatch):
    """The first cell keeps its slot until the last has begun, in the other."""
    script = """
import os, sys, time
name, last, slot = *sys.argv[1:], os.environ["SLOT"]
if name == "e":
    open(last, "w")
os.mkdir(slot)
while name == "a" and not os.path.exists(last):
    time.sleep(0.01)
time.sleep(0.1)
os.rmdir(slot)
"""
    monkeypatch.setenv("SLOT", str(tmp_path / "nothing/slot"))  # as CUDA_VISIBLE_DEVICES may be set
    slots = [{"SLOT": str(tmp_path / f"slot{n}")} for n in range(2)]
    work = [(cell(name, tmp_path), [[sys.executable, "-c", script, name, str(tmp_path / "last")]]) for name in "abcde"]
    assert Runner(slots, lambda _: None).run(work) == 0


def test_bad_arguments_are_said_before_anything_runs(recipes, tmp_path):
    for changes, message in (
        ({"texts": "held"}, r"--texts held: NAME=FILE of a file that exists"),
        ({"per_gpu": 2, "processes_per_run": 2}, "--per_gpu and --processes_per_run are both above 1"),
        ({"texts": f"held={tmp_path}/held.jsonl"}, r"--texts held=.*/held.jsonl: NAME=FILE of a file that exists"),
        ({"cell": 4}, "--cell 4: the plan has cells 0 to 3"),
        ({"cell": -1}, "--cell -1: the plan has cells 0 to 3"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ladder.main(arguments("run", recipes, tmp_path / "ladder", **changes))
    for sharing in ("per_gpu", "workers"):
        with pytest.raises(ValueError, match="--micro_batch auto with runs that share memory, of which each would take all"):
            ladder.main([*arguments("run", recipes, tmp_path / "ladder", **{sharing: 2}), "--micro_batch=auto"])
    assert not (tmp_path / "ladder").exists()
    with pytest.raises(SystemExit, match="2"):
        ladder.main([*arguments("run", recipes, tmp_path / "ladder"), "--no_such_option=1"])
    assert [path.name for path in (tmp_path / "ladder").iterdir()] == ["plan.json"]


def test_decide_says_draws_and_writes_what_it_found(tmp_path, capsys):
    table = ROOT / "tests/data/published_results.csv"
    assert ladder.main(["decide", str(table), "--target=1B", f"--output_dir={tmp_path}", "--tasks=arc_easy"]) == 0
    said, found = capsys.readouterr().out, read_json(tmp_path / "decisions.json", "")
    assert {row["task"] for row in found["rows"]} == {"arc_easy"}
    assert {row["task"] for row in found["scores"]} == {"arc_easy", "mmlu"}
    assert found["rows"] == read_jsonl(tmp_path / "decisions.jsonl", "")
    for row in found["rows"]:
        accuracy, low, high = (f"{row[name]:.2f}" for name in ("decision_accuracy", "low", "high"))
        first = f"| arc_easy | {row['size']} | {100 * row['compute_share']:.2g} % | {row['measure']} "
        assert f"{first}| {accuracy} | {low} to {high} | {row['num_pairs']} |" in " ".join(said.split())
    assert all(f" {row['mean']:.3f} " in said for row in found["scores"])
    assert (tmp_path / "decisions.png").stat().st_size > 5000
    assert said.splitlines()[3] in (tmp_path / "decisions.md").read_text()
    chosen = [f"--measures={found['rows'][-1]['measure']}", "--step=common"]
    assert ladder.main(["decide", str(table), "--target=1B", f"--output_dir={tmp_path}", "--tasks=arc_easy", *chosen]) == 0
    last, common = (decision_table(read_results(table, step), "1B", [], ["arc_easy"]) for step in ("last", "common"))
    chosen = [row for row in common if row["measure"] == found["rows"][-1]["measure"]]
    assert read_jsonl(tmp_path / "decisions.jsonl", "") == chosen
    assert found["rows"] == last != common


def test_a_pack_that_is_not_finished_is_refused(recipes, tmp_path):
    whole = write_pack(tmp_path / "whole", TOKENIZER)
    publish(whole, tmp_path / "recipes/growing", 2)
    with pytest.raises(ValueError, match="growing in .* are not packed to the end: wait, or name the others with --only"):
        find_recipes(tmp_path / "recipes")
    whole.rename(tmp_path / "recipes/whole")
    assert list(find_recipes(tmp_path / "recipes", ["whole"])) == ["whole"]


def test_a_signal_reaches_commands_that_have_just_begun(tmp_path):
    runner = Runner([{}, {}], lambda _: None)
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    work = [(cell(name, tmp_path), [[sys.executable, "-c", script]]) for name in "abc"]
    work[1][1][0][2] = "import time; time.sleep(60)"  # which the signal ends
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    begun, handler = time.monotonic(), signal.getsignal(signal.SIGUSR1)
    assert runner.run(work) == 75
    assert time.monotonic() - begun < 20
    assert signal.getsignal(signal.SIGUSR1) == handler
    assert not runner.failed
    assert not list(tmp_path.rglob("cell.json"))
    assert not (tmp_path / "c").exists(), "what has not begun does not begin then"


def test_a_command_that_is_stopped_is_asked_once_and_none_follows_it(tmp_path):
    """Also if it ends well, because it was at its end when the signal came."""
    script = f"""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill({os.getpid()}, signal.SIGUSR1)
signal.sigwait([signal.SIGTERM])
if signal.sigtimedwait([signal.SIGTERM], 1):
    open("{tmp_path}/twice", "w")
"""
    commands = [[sys.executable, "-c", script], [sys.executable, "-c", f"open('{tmp_path}/next', 'w')"]]
    runner = Runner([{}], lambda _: None)
    assert runner.run([(cell("a", tmp_path), commands)]) == 75
    assert not runner.failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.log"]
    assert not list((tmp_path / "a").iterdir())


def test_a_command_that_was_stopped_from_outside_stops_the_ladder_and_has_not_failed(tmp_path):
    runner = Runner([{}], lambda _: None)
    work = [
        (cell(name, tmp_path), [[sys.executable, "-c", f"raise SystemExit({code})"]]) for name, code in (("a", 75), ("b", 0))
    ]
    assert runner.run(work) == 75
    assert not runner.failed
    assert not [one for one in work if is_done(*one)]


def test_without_slurm_submit_says_so(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no sbatch here"):
        ladder.main(arguments("submit", recipes, tmp_path / "ladder"))
    assert not (tmp_path / "ladder").exists()


def test_seeds_differ_in_weights_and_in_the_order_of_the_data(recipes, tmp_path):
    from lm.mixed_rows import MixedRows

    first, other = cells_of(recipes, tmp_path)[:2]
    trains = [ladder.commands(ladder.Run(sizes="neox-64x2", further=tuple(TINY[1:])), one)[0] for one in (first, first, other)]
    made = [pretrain.prepare(parse(pretrain.Args, train[2:])) for train in trains]
    weights = [one.model.get_output_embeddings().weight.tolist() for one in made]
    assert weights[0] == weights[1] != weights[2]
    plans = [[one.plan.mixed.block(n, 284) for n in range(284)] for one in made]
    assert plans[0] == plans[1] != plans[2]

    class Blocks:
        seq_len = SEQ_LEN

    orders = [[MixedRows(Blocks, [], None, seed, 0.0, shuffle=True).block(n, 50) for n in range(100)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0][:50] != orders[2][:50]
    for order in orders:
        assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
        assert order[:50] not in (order[50:], list(range(50)))
