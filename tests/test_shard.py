"A base that several processes hold together: the same run as with a whole base in each."
import json, os, subprocess, sys
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from data_maker import make_data, questions
from medchat import train as module
from medchat.core import MedchatError
from medchat.models import Backend, load_run
from medchat.plots import read_log
from medchat.train import settle_stage, train

root = Path(__file__).resolve().parent.parent
SETTINGS = dict(base="tiny-qwen2-vl", max_steps=4, batch_size=2, gradient_accumulation=1, learning_rate=5e-3, warmup_steps=1, eval_records=4, eval_steps=2, answer_records=2, save_steps=2, processes=2)

def share_out(run, settings):
    run.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(root/"tests"/"shard_on_cpu.py"), str(run), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run with a whole base in each process, and one that shares it out."
    folder = tmp_path_factory.mktemp("runs")
    s = settle_stage(module.train.__kwdefaults__ | SETTINGS | dict(data=str(make_data(tmp_path_factory.mktemp("source"), questions()))))
    s = {k: v for k, v in s.items() if k not in ("run", "resume", "callbacks")}
    for name, shard in (("whole", False), ("shared", True)): share_out(folder/name, s | dict(shard=shard))
    return folder

def weights(run):
    from safetensors.torch import load_file
    return load_file(run/"adapter"/"adapter_model.safetensors")

def largest(one, two): return max((one[k] - two[k]).abs().max().item() for k in one)

def test_each_process_holds_its_part(runs):
    for rank in range(2):
        whole, shared = (json.loads((runs/name/f"rank{rank}.json").read_text()) for name in ("whole", "shared"))
        eq((whole["shared"], whole["share"], shared["shared"]), (False, 1, True))
        assert shared["share"] < .6 and shared["four_bit"] == whole["four_bit"] > 20, shared # 4-bit weights are shared out as they are

def test_the_run_is_the_same(runs):
    one, two = read_log(runs/"whole"), read_log(runs/"shared")
    eq([r["step"] for r in one], [r["step"] for r in two])
    for a, b in zip(one, two):
        for name in ("loss", "eval_loss"):
            if name in a: assert abs(a[name] - b[name]) < 1e-4, (name, a, b)
        eq(a.get("closed_accuracy"), b.get("closed_accuracy"))
    eq((runs/"whole"/"answers.jsonl").read_text(), (runs/"shared"/"answers.jsonl").read_text())

def test_the_adapter_is_gathered_whole(runs):
    one, two = weights(runs/"whole"), weights(runs/"shared")
    eq({k: v.shape for k, v in one.items()}, {k: v.shape for k, v in two.items()})
    assert largest(one, two) < 1e-3 and any(".lora_B." in k and v.any() for k, v in two.items())
    load_run(runs/"shared")
    assert (runs/"shared"/"best"/"adapter_model.safetensors").is_file()

def test_it_is_not_resumed(runs, monkeypatch):
    monkeypatch.setattr(module, "_check_processes", lambda s: None) # as if there were GPUs
    config = json.loads((runs/"shared"/"config.json").read_text())
    eq(list((runs/"shared"/"checkpoints").glob("checkpoint-*")), [])
    with pytest.raises(MedchatError, match="a run with a shared base cannot be resumed"): train(config["data"], run=runs/"shared", **SETTINGS, shard=True, resume=True)

@pytest.mark.parametrize("gpus, name, settings, says", [
    (0, "transformers", dict(shard=True, processes=2), "a base is shared out over several GPUs: 2 processes, 0 GPUs"),
    (2, "transformers", dict(shard=True), "a base is shared out over several GPUs: 1 processes, 2 GPUs"),
    (1, "transformers", dict(processes=2), "each process needs a GPU of its own: 2 processes, 1 GPUs. Take --processes 1"),
    (2, "unsloth", dict(shard=True, processes=2), "Unsloth cannot share a base out")])
def test_where_it_cannot_be_done_it_says_so_before_anything_is_written(tmp_path, monkeypatch, gpus, name, settings, says):
    import torch
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(module, "choose_backend", lambda: Backend(name, "cuda" if gpus else "cpu", ""))
    with pytest.raises(MedchatError, match=says): train(make_data(tmp_path/"source", questions()), run=tmp_path/"run", **settings)
    assert not (tmp_path/"run").exists()
