"""export_model.py: a run's checkpoint, whole or in parts, as a folder that others load."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from launch import Launch
from packs import SETTINGS, pretrain_here, write_pack
from text import byte_level_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_model
from lm.args import parse
from lm.checkpoint import damage

TOKENIZER = byte_level_bpe()
FEW = {"mixin_percent": 0.0, "total_steps": 3, "checkpoint_interval_steps": 2, "model": "psann-tiny", "micro_batch": 2}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_pack(folder / "data/c4_packed", TOKENIZER)
    assert pretrain_here(folder / "run", folder, **FEW) == 0
    options = SETTINGS | FEW | {"scratch_dir": folder, "output_dir": folder / "divided", "fsdp": "full_shard", "micro_batch": 1}
    launch = Launch("pretrain.py", options | {"force_cpu": True}, folder / "divided.out", 2)
    assert launch.wait() == [0, 0], launch.said()
    return folder


def export(model, folder, *options):
    export_model.main(parse(export_model.Args, [str(model), f"--output_dir={folder}", *options]))
    return folder


def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    return model(torch.arange(20)[None]).logits


def test_what_is_exported_is_the_run_s_final_model_with_its_tokenizer_and_card(scratch, tmp_path):
    folder = export(scratch / "run", tmp_path / "exported")
    assert torch.equal(logits(folder), logits(scratch / "run/final"))
    text = "Words, 12 numbers\n\tand spaces  ."
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == TOKENIZER(text).input_ids
    card = (folder / "README.md").read_text()
    assert "- architecture: PsannForCausalLM (respsann)" in card
    assert "optimizer steps: 3" in card
    assert "trust_remote_code=True" in card
    assert damage(folder) is None


def test_a_checkpoint_in_parts_exports_as_the_whole_one(scratch, tmp_path):
    parts = export(scratch / "divided", tmp_path / "parts", "--checkpoint=step_00000003")
    assert torch.equal(logits(parts), logits(scratch / "divided/final"))
    assert (logits(parts) - logits(scratch / "run/final")).abs().max() < 1e-5
    assert (parts / "tokenizer.json").is_file()


def test_bfloat16_in_several_files(scratch, tmp_path):
    folder = export(scratch / "run", tmp_path / "small", "--dtype=bfloat16", "--max_shard_size=100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert logits(folder).dtype == torch.bfloat16
    assert (logits(folder) - logits(scratch / "run/final")).abs().max() < 0.1


def test_the_folder_loads_where_this_repository_is_not(scratch, tmp_path):
    folder = export(scratch / "run", tmp_path / "exported")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM
assert "lm" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(model(torch.arange(20)[None]).logits.double().sum().item())
"""
    environment = {"PATH": "/usr/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == logits(folder).double().sum().item()


def test_nothing_is_written_over_and_what_is_missing_is_said(scratch, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists, a new folder is needed"):
        export(scratch / "run", tmp_path / "there")
    alone = shutil.copytree(scratch / "run/final", tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.json beside .*alone"):
        export(alone, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no checkpoint best in .*, it has final, step_00000000, step_"):
        export(scratch / "run", tmp_path / "other", "--checkpoint=best")
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_with_more_ids_than_the_head_is_refused(scratch, tmp_path):
    folder = shutil.copytree(scratch / "run/final", tmp_path / "other")
    file = json.loads((folder / "tokenizer.json").read_text())
    file["added_tokens"] += [file["added_tokens"][0] | {"id": n, "content": f"<extra {n}>"} for n in range(300, 321)]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has 321 ids, .* a vocabulary of 320"):
        export(folder, tmp_path / "exported")
