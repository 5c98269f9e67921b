"Training: what it writes, that it is right, that it can be stopped, and what it refuses."
import hashlib, json, math, os, re, shutil, signal, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from data_maker import make_base, make_data, picture, questions, row
from medchat import train as module
from medchat.batches import VisionCollator
from medchat.core import MedchatError
from medchat.curate import convert, read_dataset
from medchat.families import family_of
from medchat.models import load_model, load_run
from medchat.plots import read_log
from medchat.runs import last_checkpoint
from medchat.train import Quiz, pick_records, train

BASE = "tiny-qwen2-vl"
SHORT = dict(base=BASE, max_steps=6, batch_size=4, gradient_accumulation=1, learning_rate=5e-3, eval_records=4, eval_steps=3, answer_records=2)

@pytest.fixture(scope="module")
def loaded():
    model, processor = load_model(BASE)
    return processor, family_of(model.config)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A dataset folder of 12 images with three questions each."
    return make_data(tmp_path_factory.mktemp("source"), questions())

def weights(run): return hashlib.sha256((Path(run)/"adapter"/"adapter_model.safetensors").read_bytes()).hexdigest()

# -- training

@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    "A run of six steps, and everything it printed."
    run = tmp_path_factory.mktemp("runs")/"first"
    eq(train(data, run=str(run), **SHORT), run)
    return run

def test_the_run_folder_is_complete(finished, data):
    for name in ("config.json", "log.jsonl", "receipt.md", "checkpoints", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json", "adapter/processor_config.json"):
        assert (finished/name).exists(), name
    assert not list(finished.glob(".*")) and not (finished/"adapter"/"README.md").exists()
    config = json.loads((finished/"config.json").read_text())
    eq({k: config[k] for k in SHORT}, SHORT)
    assert config["seed"] == 3407 and config["r"] == 16 and config["lora_alpha"] == 16 and config["records"] == {"train": 24, "validation": 6, "test": 6}
    assert len(config["base_sha256"]) == len(config["data_sha256"]) == 64 and config["versions"]["trl"]

def test_what_may_be_published_names_no_folder_of_this_machine(finished, data):
    home = str(Path(module.__file__).resolve().parent.parent)
    for file in (finished/"adapter").iterdir():
        text = file.read_bytes()
        for place in (home, str(finished.parent), str(Path(data).parent), os.environ.get("MEDCHAT_SAMPLE_DATA") or home): assert place.encode() not in text, (file.name, place)
    eq(json.loads((finished/"adapter"/"adapter_config.json").read_text())["base_model_name_or_path"], BASE)

def test_the_log_has_every_step_and_validation(finished):
    rows = read_log(finished)
    eq([r["step"] for r in rows if "loss" in r], [1, 2, 3, 4, 5, 6]); eq([r["step"] for r in rows if "eval_loss" in r], [0, 3, 6])
    for r in rows:
        assert all(math.isfinite(v) for v in r.values())
        if "loss" in r: assert set(r) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "token_accuracy", "tokens", "seconds"}
    eq(sorted(r["seconds"] for r in rows), [r["seconds"] for r in rows])
    rates = [r["learning_rate"] for r in rows if "loss" in r]
    eq([round(x, 6) for x in rates[:5]], [0.0, .001, .002, .003, .004])

def test_the_receipt_shows_what_is_learnt(finished):
    text = (finished/"receipt.md").read_text()
    for part in ("| train records | 24 |", "| steps | 6 |", "trainable parameters", "share of their tokens learnt", "image tokens in them | 16 on average", "memory", "[["): assert part in text, part

def test_the_first_loss_is_the_cross_entropy_of_the_answers(finished, data, loaded, monkeypatch):
    "Computed by hand on the untouched base: LoRA starts as nothing."
    import torch
    seen = []
    collate = VisionCollator.__call__
    def watch(self, rows):
        if len(rows) == SHORT["batch_size"]: seen.append(rows)
        return collate(self, rows)
    monkeypatch.setattr(VisionCollator, "__call__", watch)
    monkeypatch.setattr(module, "_workers", lambda: 0) # in this process, to be watched
    run = finished.parent/"watched"
    train(data, run=str(run), **{**SHORT, "max_steps": 1, "eval_records": 0})
    model, processor = load_model(BASE)
    batch = VisionCollator(*loaded)(seen[0])
    with torch.no_grad(): logits = model(**{k: v for k, v in batch.items() if k not in ("labels", "ids")}).logits.double()
    total = n = 0
    for row, labels in zip(logits.log_softmax(-1), batch["labels"]):
        for t in range(1, len(labels)):
            if labels[t] != -100: total, n = total - row[t-1, labels[t]].item(), n + 1
    eq(round(read_log(run)[0]["loss"], 3), round(total/n, 3))
    assert abs(read_log(run)[0]["loss"] - total/n) < 1e-4

def test_accumulation_equals_a_large_batch(finished, data):
    "The same eight records in one pass of eight and in four passes of two."
    rows = []
    for name, size in (("wide", 8), ("narrow", 2)):
        run = finished.parent/name
        train(data, run=str(run), **{**SHORT, "max_steps": 2, "batch_size": size, "gradient_accumulation": 8//size, "eval_records": 0, "warmup_steps": 0})
        rows.append(read_log(run))
    for wide, narrow in zip(*rows):
        assert abs(wide["loss"] - narrow["loss"]) < 1e-3 and abs(wide["grad_norm"] - narrow["grad_norm"]) < 1e-2*wide["grad_norm"], (wide, narrow)

def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(finished, data):
    train(data, run=str(finished.parent/"same"), **SHORT)
    eq(weights(finished.parent/"same"), weights(finished))
    train(data, run=str(finished.parent/"other"), **SHORT, seed=1)
    assert weights(finished.parent/"other") != weights(finished)

def test_lora_stays_at_32_bits_and_moves(finished):
    import torch
    from safetensors.torch import load_file
    tensors = load_file(finished/"adapter"/"adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    moved = [t for k, t in tensors.items() if "lora_B" in k]
    assert all(t.abs().sum() > 0 for t in moved)
    assert any((t != t.bfloat16().float()).any() for t in moved) # really 32 bits, not 16 stored in 32

def test_the_finished_run_loads(finished):
    model, processor = load_run(finished)
    assert any("lora_" in n for n, _ in model.named_parameters())

def press_ctrl_c(at):
    from transformers import TrainerCallback
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == at: signal.raise_signal(signal.SIGINT)
    return Press()

@pytest.mark.parametrize("at", [0, 3])
def test_stopped_and_resumed_equals_never_stopped(finished, data, tmp_path, at):
    run, usual = tmp_path/"run", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {at+1} of 6"): train(data, run=str(run), **SHORT, callbacks=(press_ctrl_c(at),))
    assert signal.getsignal(signal.SIGINT) is usual and not (run/"adapter").exists()
    with pytest.raises(MedchatError, match="no adapter yet.*--resume"): load_run(run)
    train(data, run=str(run), **SHORT, resume=True)
    eq(weights(run), weights(finished))
    strip = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    eq(strip(read_log(run)), strip(read_log(finished)))

def test_a_run_that_was_killed_while_it_saved_resumes_from_the_checkpoint_before(finished, data, tmp_path):
    run = tmp_path/"run"
    with pytest.raises(KeyboardInterrupt): train(data, run=str(run), **SHORT, save_steps=2, callbacks=(press_ctrl_c(4),))
    newest = last_checkpoint(run)
    eq(newest.name, "checkpoint-5")
    (newest/"optimizer.pt").rename(run/"kept")
    eq(last_checkpoint(run).name, "checkpoint-4") # going on without its moments would be another training
    (run/"kept").rename(newest/"optimizer.pt")
    (newest/"trainer_state.json").write_text('{"global_st')
    (newest/"adapter_model.safetensors").write_bytes(b"half")
    with open(run/"log.jsonl", "a") as f: f.write('{"step": 6, "loss": 9.9, "seconds": 99}\n')
    eq(last_checkpoint(run).name, "checkpoint-4")
    train(data, run=str(run), **SHORT, save_steps=2, resume=True)
    eq(weights(run), weights(finished))
    eq([r["step"] for r in read_log(run) if "loss" in r], [1, 2, 3, 4, 5, 6])

def test_ctrl_c_in_a_terminal(finished, data, tmp_path):
    "The real thing: a process, a signal, exit code 130, the command to go on."
    run = tmp_path/"run"
    argv = ["train", "--data", data, "--base", BASE, "--run", str(run), "--max-steps", "500", "--batch-size", "4", "--gradient-accumulation", "1", "--eval-records", "0"]
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from medchat.cli import main; sys.exit(main())" # a test runner in the background may hand down an ignored SIGINT
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(module.__file__).parent.parent)
    end = time.time() + 400
    while time.time() < end and process.poll() is None and not (run/"log.jsonl").exists() or (run/"log.jsonl").exists() and not read_log(run): time.sleep(.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    eq(process.returncode, 130)
    assert "--resume" in err and "Traceback" not in err, err
    assert last_checkpoint(run) and not (run/"adapter").exists()

# -- refusals, each before anything is written

def test_a_run_is_never_overwritten(finished, data):
    before = {p: p.stat().st_mtime for p in finished.rglob("*")}
    with pytest.raises(MedchatError, match="already there.*--resume"): train(data, run=str(finished), **SHORT)
    eq({p: p.stat().st_mtime for p in finished.rglob("*")}, before)

def test_a_finished_run_says_so(finished, data, capsys):
    train(data, run=str(finished), **SHORT, resume=True)
    assert "is finished" in capsys.readouterr().out

@pytest.mark.parametrize("change, says", [(dict(learning_rate=1e-3), "another learning_rate: 0.005, now 0.001"), (dict(projector_learning_rate=1e-3), "another projector_learning_rate"), (dict(processes=2), "another processes"), (dict(patience=3), "another patience"), (dict(stage="align"), "captions"), (dict(max_steps=8), "another max_steps"), (dict(seed=1), "another seed"),
    (dict(vision_layers=True), "another vision_layers"), (dict(turns_per_image=2), "another turns_per_image")])
def test_resuming_otherwise_is_refused_by_name(finished, data, change, says):
    with pytest.raises(MedchatError, match=says): train(data, run=str(finished), **{**SHORT, **change}, resume=True)

def test_resuming_on_other_data_or_base_is_refused(finished, data, tmp_path):
    shutil.copytree(data, tmp_path/"data")
    train(str(tmp_path/"data"), run=str(finished), **SHORT, resume=True) # the same data elsewhere is the same data
    report = tmp_path/"data"/"report.json"
    report.write_text(report.read_text() + " ")
    with pytest.raises(MedchatError, match="made with another data"): train(str(tmp_path/"data"), run=str(finished), **SHORT, resume=True)
    config = json.loads((finished/"config.json").read_text())
    shutil.copytree(finished, tmp_path/"run")
    (tmp_path/"run"/"config.json").write_text(json.dumps({**config, "base_sha256": "0"*64}))
    with pytest.raises(MedchatError, match="made with another base"): train(data, run=str(tmp_path/"run"), **SHORT, resume=True)

@pytest.mark.parametrize("change, says", [
    (dict(base="tiny-none"), "no such tiny base"), (dict(lora_alpha=0), "lora_alpha must be above 0"), (dict(lora_dropout=1.), "lora_dropout must be below 1"), (dict(max_grad_norm=math.nan), "max_grad_norm must be above 0"),
    (dict(learning_rate=math.inf), "learning_rate"), (dict(seed=2**32), "seed must be below"), (dict(r=10**12), "r must be below"), (dict(max_steps=0), "max_steps must be above 0"), (dict(max_steps=-3), "max_steps must be above 0"), (dict(batch_size=0), "batch_size"),
    (dict(gradient_accumulation=0), "gradient_accumulation"), (dict(learning_rate=0.0), "learning_rate"), (dict(learning_rate=float("nan")), "learning_rate"), (dict(r=0), "r must"), (dict(turns_per_image=0), "turns_per_image"),
    (dict(eval_records=-1), "eval_records must not"), (dict(answer_records=-1), "answer_records must not"), (dict(patience=0), "patience must be above 0"), (dict(processes=0), "processes must be above 0"), (dict(contrast=-1.), "contrast"), (dict(projector_learning_rate=0.), "projector_learning_rate must"), (dict(processes=2, callbacks=(1,)), "callbacks cannot be sent"), (dict(lora_dropout=-.1), "lora_dropout"), (dict(seed=-1), "seed"),
    (dict(language_layers=False), "nothing to train"), (dict(attention=False, mlp=False), "nothing to train")])
def test_bad_settings_leave_nothing_behind(data, tmp_path, change, says):
    with pytest.raises(MedchatError, match=says) as e: train(data, run=str(tmp_path/"run"), **{**SHORT, **change})
    assert "\n" not in str(e.value) and not (tmp_path/"run").exists()

@pytest.mark.parametrize("make, says", [(lambda d: d/"none", "no such dataset folder"), (lambda d: d, "not a dataset folder"), (lambda d: (d/"f").write_text("") or d/"f", "not a dataset folder")])
def test_bad_data_leaves_nothing_behind(tmp_path, make, says):
    (tmp_path/"in").mkdir()
    with pytest.raises(MedchatError, match=says): train(str(make(tmp_path/"in")), run=str(tmp_path/"run"), **SHORT)
    assert not (tmp_path/"run").exists()

def test_a_dataset_without_a_training_split_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path/"data")
    shutil.rmtree(tmp_path/"data"/"train")
    (tmp_path/"data"/"dataset_dict.json").write_text('{"splits": ["validation", "test"]}')
    with pytest.raises(MedchatError, match="no training split.*validation, test"): train(str(tmp_path/"data"), run=str(tmp_path/"run"), **SHORT)
    assert not (tmp_path/"run").exists()

def test_a_record_too_long_for_the_base_stops_before_the_first_step(tmp_path):
    source = tmp_path/"source"
    source.mkdir()
    rows = [dict(id=f"r{i}", images=[], turns=[dict(role="user", text=f"Why {i}?" if i != 37 else "why " * 20000), dict(role="assistant", text="so")], kind="vqa", split="train") for i in range(60)]
    (source/"records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    convert(source, format="records", out=tmp_path/"data", keep_splits=True)
    with pytest.raises(MedchatError, match="too long for the base: r37"): train(str(tmp_path/"data"), run=str(tmp_path/"run"), **SHORT)
    assert not (tmp_path/"run").exists()

def test_no_room_to_write(data, no_write):
    with pytest.raises(MedchatError) as e: train(data, run=str(no_write), **SHORT)
    assert "\n" not in str(e.value)

def test_the_run_may_not_be_a_file(data, tmp_path):
    (tmp_path/"run").write_text("mine")
    with pytest.raises(MedchatError, match="not a folder"): train(data, run=str(tmp_path/"run"), **SHORT)
    eq((tmp_path/"run").read_text(), "mine")

def test_a_folder_with_other_things_in_it_is_not_a_run(data, tmp_path):
    (tmp_path/"run").mkdir(); (tmp_path/"run"/"thesis.doc").write_text("mine")
    for resume in (False, True):
        with pytest.raises(MedchatError): train(data, run=str(tmp_path/"run"), **SHORT, resume=resume)
    eq([p.name for p in (tmp_path/"run").iterdir()], ["thesis.doc"])

def poison(at, what):
    from transformers import TrainerCallback
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == at: what(model)
    return Poison()

def test_a_loss_that_is_not_a_number_stops_the_run_and_names_its_records(data, tmp_path, monkeypatch):
    batches, collate = [], VisionCollator.__call__
    monkeypatch.setattr(VisionCollator, "__call__", lambda self, rows: batches.append([r["id"] for r in rows]) or collate(self, rows))
    monkeypatch.setattr(module, "_workers", lambda: 0) # in this process, to be watched
    nan = poison(2, lambda model: next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan")))
    with pytest.raises(MedchatError, match="loss is no longer a number: step 3. Lower --learning-rate.*bad_batch.json") as e: train(data, run=str(tmp_path/"run"), **{**SHORT, "batch_size": 2, "gradient_accumulation": 2, "eval_records": 0, "answer_records": 0}, callbacks=(nan,))
    assert "\n" not in str(e.value) and not (tmp_path/"run"/"adapter").exists()
    bad = json.loads((tmp_path/"run"/"bad_batch.json").read_text())
    eq((bad["step"], bad["what"]), (3, "loss"))
    passes = [b for b in batches if len(b) == 2] # the receipt looks at one record at a time
    eq(bad["records"], passes[4] + passes[5])
    eq([r["step"] for r in read_log(tmp_path/"run")], [1, 2]) # the bad step is not in the log

@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_cannot_be_read_is_one_line_whoever_reads_it(data, tmp_path, monkeypatch, workers):
    collate = VisionCollator.__call__
    def broken(self, rows):
        if len(rows) == 1: return collate(self, rows) # the receipt looks at one record at a time
        raise MedchatError("nothing in a record would be learnt", rows[0]["id"], "Check its answers and the base's chat template")
    monkeypatch.setattr(VisionCollator, "__call__", broken)
    monkeypatch.setattr(module, "_workers", lambda: workers)
    with pytest.raises(MedchatError, match=r"^nothing in a record would be learnt: \S+\. Check its answers and the base's chat template$"):
        train(data, run=str(tmp_path/"run"), **{**SHORT, "eval_records": 0, "answer_records": 0})

@pytest.mark.parametrize("problem, want", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), r"^a process that reads ahead was ended: DataLoader worker .*\. Perhaps memory ran out: go on with --resume"),
    (lambda: (_ for _ in ()).throw(ValueError("no such thing")), r"^no such thing$"),
    (lambda: (_ for _ in ()).throw(MedchatError("cannot read the image", "x.png", "Look at it")), r"^cannot read the image: x.png\. Look at it$")])
def test_whatever_ends_a_reader_is_one_line(problem, want):
    loader = module.make_loader([0, 1, 2, 3], [[0], [1], [2], [3]], lambda rows: problem() if rows == [2] else rows, 1, False)
    with pytest.raises((MedchatError, ValueError), match=want) as e:
        with module.reader_error(): list(loader)
    assert "\n" not in str(e.value)

def test_little_shared_memory_means_no_reader(monkeypatch):
    real = module.shutil.disk_usage
    for free, workers in ((2**31, 1), (2**26, 0)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: real(path)._replace(free=free))
        eq(module._workers(), workers if sys.platform == "linux" and os.cpu_count() > 1 else 0)

def test_running_out_of_memory_is_one_line_with_a_way_out(data, tmp_path):
    import torch
    with pytest.raises(MedchatError, match=r"out of memory: .*Train into a new run with --batch-size 2 --gradient-accumulation 2") as e:
        train(data, run=str(tmp_path/"run"), **SHORT, callbacks=(poison(1, lambda model: torch.empty(10**15)),)) # the real allocator says no
    assert "\n" not in str(e.value)
    with pytest.raises(MedchatError, match="--batch-size 1 --gradient-accumulation 9"):
        with module.memory_error(dict(batch_size=3, gradient_accumulation=3)): raise MemoryError
    with pytest.raises(MedchatError, match="a smaller base"):
        with module.memory_error(dict(batch_size=1, gradient_accumulation=3)): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="something else"):
        with module.memory_error(dict(batch_size=1, gradient_accumulation=3)): raise RuntimeError("something else")

@pytest.mark.parametrize("tool", ["tensorboard", "wandb", "trackio"])
def test_a_logging_tool_that_is_missing_is_named_with_its_command(data, tmp_path, monkeypatch, tool):
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(MedchatError, match=f"report_to {tool} needs the package {tool}.*Install it: pip install {tool}"): train(data, run=str(tmp_path/"run"), **SHORT, report_to=tool)
    assert not (tmp_path/"run").exists()

@pytest.mark.skipif(not find_spec("tensorboard"), reason="no tensorboard: pip install tensorboard")
def test_tensorboard_gets_the_log_too(data, tmp_path):
    train(data, run=str(tmp_path/"run"), **{**SHORT, "max_steps": 2}, report_to="tensorboard")
    assert [f for f in (tmp_path/"run").rglob("events.out.tfevents*") if f.stat().st_size > 500]
    eq([r["step"] for r in read_log(tmp_path/"run") if "loss" in r], [1, 2])

def test_patience_ends_early_and_keeps_the_best(data, tmp_path):
    run = train(data, run=tmp_path/"run", **{**SHORT, "max_steps": 40, "eval_steps": 1, "learning_rate": .3, "answer_records": 0}, patience=2)
    looks = {r["step"]: r["eval_loss"] for r in read_log(run) if "eval_loss" in r}
    best = min(looks, key=looks.get)
    assert max(looks) == best + 2 < 40
    load_run(run)
    assert (run/"adapter"/"adapter_model.safetensors").read_bytes() == (run/"best"/"adapter_model.safetensors").read_bytes()
    before = (run/"log.jsonl").read_bytes()
    train(data, run=run, **{**SHORT, "max_steps": 40, "eval_steps": 1, "learning_rate": .3, "answer_records": 0}, patience=2, resume=True) # finished
    assert (run/"log.jsonl").read_bytes() == before

def test_without_patience_the_last_adapter_counts_and_the_best_lies_beside(finished):
    assert (finished/"best"/"adapter_model.safetensors").is_file()
    looks = {r["step"]: r["eval_loss"] for r in read_log(finished) if "eval_loss" in r}
    eq((finished/"best"/"adapter_model.safetensors").read_bytes() == (finished/"adapter"/"adapter_model.safetensors").read_bytes(), min(looks, key=looks.get) == 6)

def test_the_quiz_is_about_closed_questions_and_writes_its_answers(finished, data):
    rows = list(map(json.loads, (finished/"answers.jsonl").open()))
    eq([r["step"] for r in rows], [0, 0, 3, 3, 6, 6])
    eq({r["question"] for r in rows}, {"Is it large?"}); eq(len({r["id"] for r in rows}), 2)
    for look in (r for r in read_log(finished) if "eval_loss" in r):
        said = [r["reply"].lower().strip(".") == r["reference"] for r in rows if r["step"] == look["step"]]
        eq(look["closed_accuracy"], sum(said)/len(said))
    eq(Quiz(finished, None, 4, 1).rows, []); eq(Quiz(finished, read_dataset(data)["validation"], 0, 1).rows, [])

def test_a_family_that_does_not_mix_learns_from_a_mixed_dataset(tmp_path):
    rows = [row(f"r{i}", [(f"What is {i}?", f"it is {i}")], [f"{i}.png"] if i % 3 else [], split="validation" if i > 14 else "train", answer_type="closed") for i in range(20)]
    data, base = make_data(tmp_path/"in", rows), make_base("tiny-llama-3.2-vision", tmp_path/"base")
    run = train(data, run=tmp_path/"run", base=base, epochs=2, batch_size=2, gradient_accumulation=2, learning_rate=1e-3, vision_layers=True, eval_records=5, eval_steps=3, answer_records=5)
    rows = read_log(run)
    once = json.loads((run/"config.json").read_text())["steps_per_epoch"]
    eq((once, [r["step"] for r in rows if "loss" in r][-1]), (4, 8)) # 10 with an image in 3 steps, 5 without in one: 4, 4, 2 and 5
    assert all(math.isfinite(r.get("loss", 0)) for r in rows) and [r for r in rows if "closed_accuracy" in r]
    from safetensors.torch import load_file
    tensors = load_file(run/"adapter"/"adapter_model.safetensors")
    assert any("multi_modal_projector" in k for k in tensors) and all(t.abs().sum() > 0 for k, t in tensors.items() if "lora_B" in k and "language_model" in k)
    load_run(run)

def test_without_validation_records(data, tmp_path):
    shutil.copytree(data, tmp_path/"data")
    shutil.rmtree(tmp_path/"data"/"validation")
    (tmp_path/"data"/"dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train(str(tmp_path/"data"), run=str(tmp_path/"run"), **{**SHORT, "max_steps": 2})
    assert not [r for r in read_log(tmp_path/"run") if "eval_loss" in r]

def test_several_turns_vision_layers_and_whole_epochs(data, tmp_path):
    train(data, run=str(tmp_path/"run"), base=BASE, epochs=2, batch_size=2, gradient_accumulation=2, turns_per_image=3, vision_layers=True, eval_records=2)
    rows = [r for r in read_log(tmp_path/"run") if "loss" in r]
    eq((len(rows), rows[-1]["epoch"]), (4, 2)) # 8 conversations, 4 in a step, twice
    from safetensors import safe_open
    with safe_open(str(tmp_path/"run"/"adapter"/"adapter_model.safetensors"), "pt") as f: assert any("visual" in k for k in f.keys())
    load_run(tmp_path/"run")

def test_the_validation_records_are_always_the_same_and_never_too_many(data):
    split = read_dataset(data)["validation"]
    eq(pick_records(split, 4, 1)["id"][:], pick_records(split, 4, 1)["id"][:])
    eq(len(pick_records(split, 99, 1)), len(split))
    eq(pick_records(None, 4, 1), None); eq(pick_records(split, 0, 1), None)

def test_training_is_quiet_and_asks_nobody(data, tmp_path, capfd, recwarn, monkeypatch):
    import socket
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or (_ for _ in ()).throw(OSError("offline")))
    connect = socket.socket.connect
    def ask(self, address): # the process that reads ahead hands its batches over on this machine
        if self.family == socket.AF_UNIX: return connect(self, address)
        asked.append(address); raise OSError("offline")
    monkeypatch.setattr(socket.socket, "connect", ask)
    train(data, run=str(tmp_path/"run"), **{**SHORT, "max_steps": 2})
    out, err = capfd.readouterr()
    eq(len(out.splitlines()), 1); eq(asked, [])
    eq([re.sub(r"\d+\.\d+|\d+(?=%)", "N", line) for line in err.splitlines()], [f"step {i} of 2: validation loss N, N% of the closed questions right" for i in (0, 2)]) # no bar without a terminal
    eq([str(w.message)[:80] for w in recwarn if "medchat" not in str(w.filename)], [])

def test_only_some_kinds_of_records(data, tmp_path):
    rows = [dict(id=f"{kind}{i}", images=[f"{i}.png"], turns=[dict(role="user", text="What?"), dict(role="assistant", text=f"a {kind}")], kind=kind, split="train", group=str(i))
            for i in range(3) for kind in ("caption", "vqa")]
    for i in range(3): picture(i).save(tmp_path/f"{i}.png")
    (tmp_path/"records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = str(convert(tmp_path, format="records", out=tmp_path/"data", keep_splits=True))
    run = train(both, run=tmp_path/"run", kinds="caption", **{**SHORT, "max_steps": 1})
    eq(json.loads((run/"config.json").read_text())["records"], {"train": 3})
    receipt = (run/"receipt.md").read_text()
    assert "a caption" in receipt and "a vqa" not in receipt
    with pytest.raises(MedchatError, match="no records of this kind: film. The dataset has: caption, vqa"): train(both, run=tmp_path/"other", kinds="film", **SHORT)
    assert not (tmp_path/"other").exists()
