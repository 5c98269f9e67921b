"Training in two processes: one run, the same curve, equal adapters."
import hashlib, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from data_maker import make_data, questions
from medchat import train as module
from medchat.core import MedchatError
from medchat.models import load_run
from medchat.plots import read_log
from medchat.train import train

root = Path(__file__).resolve().parent.parent
SETTINGS = dict(base="tiny-qwen2-vl", max_steps=5, gradient_accumulation=2, learning_rate=5e-3, warmup_steps=1, eval_records=4, eval_steps=2, answer_records=2, save_steps=100)

# ---- what the processes do; they import this file

def watched(run, *rest):
    "The work of `train`, and then what this process holds, for the test to read. The second process is stopped in the third step of the first try."
    from medchat.models import import_transformers
    TrainerCallback = import_transformers().TrainerCallback
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **_): (state.global_step, os.environ["RANK"]) == (2, "1") and signal.raise_signal(signal.SIGINT)
    made, real = [], module.make_trainer
    def make(*a, **k):
        made.append(real(*a, **k))
        if not rest[2]: made[0].add_callback(Press()) # no checkpoint yet
        return made[0]
    module.make_trainer = make
    if stopped := module._child(run, *rest): return stopped
    trained = [p for p in made[0].model.parameters() if p.requires_grad]
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained)).hexdigest()
    found = dict(rank=os.environ["RANK"], world=made[0].args.world_size, backend=made[0].args.ddp_backend, weights=digest, rows=made[0].plan)
    (run.parent/f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))

def failing(run, *rest):
    "One process ends with an error, the other would wait for it."
    if os.environ["RANK"] == "1": raise MedchatError("the second process cannot go on", "rank 1", "Mend it")
    time.sleep(60)

def dying(run, *rest):
    "One process is killed, as the system does when memory is gone."
    if os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

# ---- the tests

@pytest.fixture(scope="module")
def data(tmp_path_factory): return make_data(tmp_path_factory.mktemp("source"), questions())

@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    "A run by one process; the same by two, stopped once and resumed; and what the two said."
    folder = tmp_path_factory.mktemp("runs")
    train(data, run=folder/"one", **SETTINGS, batch_size=4)
    code = f"""import sys; sys.path[:0] = {[str(Path(__file__).parent), str(root)]!r}
import medchat.train, test_processes
from medchat.cli import main
if __name__ == "__main__":
    medchat.train._child = test_processes.watched
    sys.exit(main())"""
    (folder/"start.py").write_text(code)
    options = [w for k, v in {**SETTINGS, "batch_size": 2, "data": data, "run": folder/"two", "processes": 2}.items() for w in ("--" + k.replace("_", "-"), str(v))]
    for more, code in (([], 130), (["--resume"], 0)):
        done = subprocess.run([sys.executable, str(folder/"start.py"), "train", *options, *more], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200)
        with open(folder/"said.txt", "a") as f: f.write(done.stdout + done.stderr)
        assert done.returncode == code, done.stdout + done.stderr
    return folder

def ranks(runs): return [json.loads((runs/f"rank{k}.json").read_text()) for k in range(2)]

def test_there_are_two_and_they_hold_the_same_adapter(runs):
    a, b = ranks(runs)
    eq((a["rank"], b["rank"], a["world"], b["world"], a["backend"]), ("0", "1", 2, 2, "gloo"))
    eq(a["weights"], b["weights"])

def test_each_has_its_half_of_every_pass(runs):
    a, b = ranks(runs)
    eq((len(a["rows"]), len(b["rows"])), (10, 10)) # 5 steps of 2 passes
    for mine, others in zip(a["rows"], b["rows"]): assert len(mine) == len(others) == 2 and not set(mine) & set(others)

def test_the_curve_is_that_of_one_process_with_the_same_batches(runs):
    one, two = read_log(runs/"one"), read_log(runs/"two")
    eq([(r["step"], r.get("epoch"), "loss" in r) for r in two], [(r["step"], r.get("epoch"), "loss" in r) for r in one])
    for a, b in zip(one, two):
        for name in ("loss", "eval_loss", "learning_rate"):
            if name in a: assert abs(a[name] - b[name]) < 1e-4, (name, a, b)
        for name in ("tokens", "closed_accuracy"): eq(a.get(name), b.get(name))
        if "grad_norm" in a: assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3*max(1, a["grad_norm"]), (a, b)
        for name in ("token_accuracy", "eval_token_accuracy"):
            if name in a: assert abs(a[name] - b[name]) < 1e-6, (a, b)

def test_the_adapter_is_that_of_one_process(runs):
    from safetensors.torch import load_file
    one, two = (load_file(runs/name/"adapter"/"adapter_model.safetensors") for name in ("one", "two"))
    eq(set(one), set(two))
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-3 and sum((one[k] - two[k]).pow(2).sum().item() for k in one) < 1e-3*sum(t.pow(2).sum().item() for t in one.values())
    load_run(runs/"two")

def test_ctrl_c_in_one_process_stops_both_after_the_same_step(runs):
    said = (runs/"said.txt").read_text()
    eq(re.findall("stopped.*", said), ["stopped. Go on with: medchat train " + re.search("medchat train (.*) --resume", said)[1] + " --resume"])

def test_one_folder_one_log_one_progress(runs):
    said = (runs/"said.txt").read_text()
    eq(len(re.findall("steps, loss", said)), 1)
    eq(re.findall(r"step (\d) of 5: validation loss", said), ["0", "2", "4", "5"])
    eq(len(said.splitlines()), 6) # four looks, how it was stopped, how it ended; nothing else
    eq([r["step"] for r in read_log(runs/"two") if "loss" in r], [1, 2, 3, 4, 5])
    files = lambda run: sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and "rng_state" not in p.name and "checkpoint-3" not in p.parts)
    eq(files(runs/"two"), files(runs/"one"))
    eq(len((runs/"two"/"answers.jsonl").read_text().splitlines()), 2*4)
    assert len(list((runs/"two"/"checkpoints"/"checkpoint-3").glob("rng_state_*.pth"))) == 2
    eq(json.loads((runs/"two"/"config.json").read_text())["processes"], 2)

def test_a_world_of_another_size_is_an_error(data, runs, tmp_path, monkeypatch):
    "One process that was told to be one of two."
    config = json.loads((runs/"two"/"config.json").read_text())
    s = {k: config[k] for k in module.train.__kwdefaults__ if k in config} | dict(data=data)
    with pytest.raises(MedchatError, match="the processes did not find each other: 1 of 2"): module._work(tmp_path/"run", s, config, None, 0.)
    with pytest.raises(MedchatError, match="another processes: 2, now 1"): train(data, run=runs/"two", **SETTINGS, batch_size=2, resume=True)

@pytest.mark.parametrize("work, says", [(failing, "a process of the run failed: .*the second process cannot go on: rank 1. Mend it.*--resume"), (dying, "a process of the run failed: .*Signal 9.*--resume")])
def test_a_process_that_fails_is_one_line(data, tmp_path, monkeypatch, capfd, work, says):
    from medchat.cli import main
    monkeypatch.setattr(module, "_child", work)
    began = time.time()
    eq(main(["train", "--data", data, "--run", str(tmp_path/"run"), "--processes", "2", "--max-steps", "2"]), 2)
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(says, err), err
    assert time.time() - began < 50 # nobody waits for the other one
