"A run that is killed, again and again, ends as if nobody had touched it."
import hashlib, json, os, random, re, resource, shutil, signal, subprocess, sys, time, traceback
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq

root = Path(__file__).resolve().parent.parent
SETTINGS = dict(base="tiny-qwen2-vl", max_steps=16, batch_size=2, gradient_accumulation=2, turns_per_image=2, lora_dropout=.1, learning_rate=5e-3, warmup_steps=2, # dropout: the random state counts too
    eval_steps=4, eval_records=4, answer_records=2, save_steps=2)
ENDING = SETTINGS | dict(turns_per_image=1, learning_rate=.3, eval_steps=2, patience=2, lora_dropout=0.) # at this rate it gets worse soon

# ---- the script: imports everything once, then forks a process for each try, so that a try costs seconds

def fork(work, said: Path):
    "Do something in a process of its own, what it says goes to a file."
    if pid := os.fork(): return pid
    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1); os.dup2(out, 2)
        code = work() or 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def train_in(data, run, settings, before=lambda: None, resume=True):
    "A process that trains by the command's own way: exit code and one line."
    def work():
        import medchat.cli, medchat.train
        before()
        medchat.cli._load = lambda name: lambda: medchat.train.train(data, run=str(run), **settings, resume=resume)
        medchat.cli.make_parser = lambda *a: __import__("argparse").ArgumentParser()
        return medchat.cli.main(["train"])
    return fork(work, run.with_suffix(".txt"))

def dies_writing(piece):
    "SIGKILL when a file whose path holds `piece` is half written, or a folder is half removed."
    import peft.peft_model, torch, transformers
    def deadly(place, name, argument):
        real = getattr(place, name)
        def call(*a, **k):
            if piece not in str(a[argument]): return real(*a, **k)
            path = Path(a[argument])
            if name == "rmtree": sorted(path.iterdir())[0].unlink()
            else:
                real(*a, **k)
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(place, name, call)
    for place, name, argument in ((torch, "save", 1), (peft.peft_model, "safe_save_file", 1), (transformers.TrainerState, "save_to_json", 1), (shutil, "rmtree", 0)): deadly(place, name, argument)

def dies_at(name):
    "SIGKILL when a function of medchat.train is called."
    import medchat.train
    setattr(medchat.train, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))

def lines(run): return (run/"log.jsonl").read_bytes().count(b"\n") if (run/"log.jsonl").exists() else 0

def killed_after(data, run, settings, ready, wait, most=120):
    "Start, wait until `ready(run)` and a little more, SIGKILL."
    pid, end = train_in(data, run, settings), time.time() + most
    while not ready(run) and time.time() < end: time.sleep(.003)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)

def no_room(limit):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return limited

def kills(data, out):
    "The run without a kill, and the one with many."
    run, chance, done = out/"killed", random.Random(0), []
    done.append(("whole", ended(train_in(data, out/"whole", SETTINGS, resume=False))))
    def at(name, code): done.append((name, code, lines(run)))
    def more(name, wait): # a line more than it had, and a moment of chance
        n = lines(run)
        at(name, killed_after(data, run, SETTINGS, lambda r: lines(r) > n, chance.uniform(0, wait)))
    at("loading", killed_after(data, run, SETTINGS, lambda r: (r/"config.json").exists(), chance.uniform(0, .5)))
    for name, wait in (("first look", 0), ("first step", .05)): more(name, wait)
    for piece in ("checkpoint-4/adapter_model.safetensors", "checkpoint-4/optimizer.pt", "checkpoint-6/scheduler.pt", "checkpoint-6/rng_state.pth", "checkpoint-8/trainer_state.json", "checkpoint-6", ".best."): # checkpoint-6: while it is removed
        at(piece, ended(train_in(data, run, SETTINGS, lambda: dies_writing(piece))))
    for name in ("some step", "another step", "a third step"): more(name, .03)
    at("all steps done", ended(train_in(data, run, SETTINGS, lambda: dies_at("finish_run"))))
    at("adapter", ended(train_in(data, run, SETTINGS, lambda: dies_writing(".adapter."))))
    at("other settings", ended(train_in(data, run, SETTINGS | dict(learning_rate=1e-3))))
    at("end", ended(train_in(data, run, SETTINGS)))
    return done

def full_disk(data, out):
    "Room for the adapter of a checkpoint but not for its optimizer; then not even for the adapter; then enough."
    run, done = out/"full", []
    size = (out/"whole"/"adapter"/"adapter_model.safetensors").stat().st_size
    for limit in (size + 10_000, size // 2): done.append((limit, ended(train_in(data, run, SETTINGS, no_room(limit)))))
    torn = open(run/"log.jsonl", "a"); torn.write('{"step": 2, "lo'); torn.close() # as a full disk leaves it
    done.append(("end", ended(train_in(data, run, SETTINGS))))
    return done

def early_end(data, out):
    "A run that ends early, killed after its end was decided and a checkpoint written."
    done = [("usual", ended(train_in(data, out/"usual", ENDING, resume=False)))]
    run = out/"patient"
    done.append(("killed", ended(train_in(data, run, ENDING, lambda: dies_at("finish_run")))))
    done.append(("end", ended(train_in(data, run, ENDING))))
    return done

def script(data, out):
    import torch
    torch.set_num_threads(1)
    import medchat.train
    from medchat.models import import_transformers
    import_transformers()
    import medchat.curate, datasets, peft, trl # noqa: what every child needs
    medchat.train._trainer_class()
    for part in (kills, full_disk, early_end): (out/f"{part.__name__}.json").write_text(json.dumps(part(data, out)))

if __name__ == "__main__": script(sys.argv[1], Path(sys.argv[2])); sys.exit()

# ---- the tests read what it did

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "A folder with the runs of the script."
    from medchat.curate import convert
    from PIL import Image
    source, out, rows = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out"), []
    for i in range(12):
        Image.frombytes("L", (112, 112), random.Random(i).randbytes(112*112)).save(source/f"{i}.png")
        for q, a in (("Is it large?", "yes" if i % 2 else "no"), ("Where is it?", "left lower lung")):
            rows.append(dict(id=f"{i}-{len(rows)}", images=[f"{i}.png"], turns=[dict(role="user", text=q), dict(role="assistant", text=a)], kind="vqa", answer_type="closed" if a in ("yes", "no") else "open", split="train" if i < 9 else "validation", group=str(i)))
    (source/"records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = convert(source, format="records", out=source/"data", keep_splits=True)
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} # a process that has threads cannot be forked
    done = subprocess.run([sys.executable, __file__, str(data), str(out)], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return out

def steps(out, part): return json.loads((out/f"{part}.json").read_text())
def said(run): return run.with_suffix(".txt").read_text()

def check_same(one, other):
    "Bit by bit: adapter, best adapter, log (but for the time), answers."
    for name in ("adapter/adapter_model.safetensors", "best/adapter_model.safetensors", "answers.jsonl"):
        eq(hashlib.sha256((one/name).read_bytes()).hexdigest(), hashlib.sha256((other/name).read_bytes()).hexdigest())
    timeless = lambda run: re.sub(r', "seconds": [\d.]+', "", (run/"log.jsonl").read_text())
    eq(timeless(one), timeless(other))

def test_killed_at_many_moments_ends_the_same_to_the_bit(out):
    (_, whole), *killed, (_, other_settings, _), (_, end, _) = steps(out, "kills")
    assert len(killed) >= 15 and [(name, code) for name, code, _ in killed if code != -signal.SIGKILL] == [], said(out/"killed")
    eq((whole, end), (0, 0))
    check_same(out/"killed", out/"whole")
    seconds = [json.loads(line)["seconds"] for line in (out/"killed"/"log.jsonl").open()]
    eq(sorted(seconds), seconds)
    eq(sorted(os.listdir(out/"killed")), sorted(os.listdir(out/"whole"))) # nothing half written stays

def test_the_kills_were_spread_over_the_run(out):
    at = [n for *_, n in steps(out, "kills")[1:-2]]
    assert at[0] == 0 and at[-1] == 21 and len(set(at)) >= 10, at # 16 steps and 5 looks

def test_a_killed_run_is_not_resumed_with_other_settings(out):
    eq(steps(out, "kills")[-2][1], 2)
    assert "the run was made with another learning_rate: 0.005, now 0.001. Give the old one" in said(out/"killed")

def test_no_traceback_anywhere(out):
    for run in ("whole", "killed", "full", "usual", "patient"): assert "Traceback" not in said(out/run) and "hit a bug" not in said(out/run), said(out/run)

def test_a_full_disk_is_one_line_and_the_run_goes_on(out):
    (_, first), (_, second), (_, end) = steps(out, "full_disk")
    eq((first, second, end), (2, 2, 0))
    eq(len(re.findall(r"^medchat: cannot write.*full.*--resume", said(out/"full"), re.M)), 2)
    check_same(out/"full", out/"whole")

def test_an_early_end_is_the_same_end_after_a_kill(out):
    eq([code for _, code in steps(out, "early_end")], [0, -signal.SIGKILL, 0])
    losses = [r for r in map(json.loads, (out/"usual"/"log.jsonl").open()) if "eval_loss" in r]
    best = min(losses, key=lambda r: r["eval_loss"])
    assert losses[-1]["step"] < 16 and losses[-1]["step"] - best["step"] == 4, losses # two looks without a better one
    assert (out/"usual"/"adapter"/"adapter_model.safetensors").read_bytes() == (out/"usual"/"best"/"adapter_model.safetensors").read_bytes()
    assert f"kept step {best['step']}" in said(out/"usual")
    check_same(out/"patient", out/"usual")
