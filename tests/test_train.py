"Labels, training, resuming: faults and edges."
import hashlib, json, math, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from medchat import train as module
from medchat.core import MedchatError
from medchat.curate import convert, read_dataset
from medchat.families import family_of
from medchat.messages import assistant_message, user_message
from medchat.models import load_model, load_run
from medchat.plots import read_log
from medchat.train import VisionCollator, join_turns, last_checkpoint, make_labels, pick_records, plan_turns, reply_spans, show_mask, train

BASE = "tiny-qwen2-vl"
SHORT = dict(base=BASE, max_steps=6, batch_size=4, gradient_accumulation=1, learning_rate=5e-3, eval_records=4, eval_steps=3)

@pytest.fixture(scope="module")
def loaded():
    model, processor = load_model(BASE)
    return processor, family_of(model.config)

def picture(seed=0, side=112):
    import numpy as np
    from PIL import Image
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side), dtype=np.uint8)).convert("RGB")

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A dataset folder of 12 images with three questions each."
    source = tmp_path_factory.mktemp("source")
    rows = []
    for i in range(12):
        picture(i).save(source/f"{i}.png")
        split = "train" if i < 8 else "validation" if i < 10 else "test"
        for q, a in (("Is it large?", "yes" if i % 2 else "no"), ("Where is it?", "left lower lung"), ("What is seen?", "a nodule")):
            rows.append(dict(id=f"{i}-{len(rows)}", images=[f"{i}.png"], turns=[dict(role="user", text=q), dict(role="assistant", text=a)], kind="vqa", split=split, group=str(i)))
    (source/"records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(convert(source, format="records", out=source/"data", keep_splits=True, max_rejects=1))

def weights(run): return hashlib.sha256((Path(run)/"adapter"/"adapter_model.safetensors").read_bytes()).hexdigest()

# -- labels

CONVERSATIONS = [
    ([user_message("Is it?", 1), assistant_message("yes")], [["yes"]], 1),
    ([user_message("Is it?", 2), assistant_message("yes"), user_message("Where?"), assistant_message("left, upper.\n\nSecond line"), user_message("Sure?"), assistant_message("no")], None, 2),
    ([user_message("No image at all?"), assistant_message("none")], None, 0),
    ([user_message("Ünïcode größer?", 1), assistant_message("β-Blocker → 5 µg, 心臓")], None, 1),
    ([user_message("assistant\nIs this a trick?", 1), assistant_message("assistant")], None, 1),
    ([user_message("yes yes yes", 1), assistant_message("yes yes yes"), user_message("yes"), assistant_message("yes")], None, 1)]

@pytest.mark.parametrize("messages, _, n", CONVERSATIONS)
def test_every_answer_with_its_end_is_learnt_and_nothing_else(loaded, messages, _, n):
    processor, family = loaded
    batch = VisionCollator(processor, family)([dict(id="x", messages=messages, images=[picture(k) for k in range(n)])])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert all(l in (-100, t) for t, l in zip(ids, labels))
    answers = [m["content"][0]["text"] + family.end_of_turn for m in messages if m["role"] == "assistant"]
    eq(processor.tokenizer.decode([l for l in labels if l != -100]), "".join(answers))
    special = set(processor.tokenizer.convert_tokens_to_ids([t for t in family.masked_tokens if t in processor.tokenizer.get_vocab()]))
    assert not special & set(labels)

def test_labels_survive_batching_and_padding(loaded):
    processor, family = loaded
    collate = VisionCollator(processor, family)
    rows = [dict(id=str(i), messages=m, images=[picture(k) for k in range(n)]) for i, (m, _, n) in enumerate(CONVERSATIONS)]
    batch = collate(rows)
    for k, row in enumerate(rows):
        alone = collate([row])
        n = alone["input_ids"].shape[1]
        eq(batch["input_ids"][k, :n].tolist(), alone["input_ids"][0].tolist()); eq(batch["labels"][k, :n].tolist(), alone["labels"][0].tolist())
        assert (batch["labels"][k, n:] == -100).all() and (batch["attention_mask"][k, n:] == 0).all()

def test_the_brackets_of_the_mask_hold_what_is_learnt(loaded):
    processor, family = loaded
    messages = CONVERSATIONS[1][0]
    shown = show_mask(processor, VisionCollator(processor, family)([dict(id="x", messages=messages, images=[picture(), picture()])]))
    eq([p for p, learnt in shown.pieces if learnt], [m["content"][0]["text"] + "<|im_end|>" for m in messages if m["role"] == "assistant"])
    assert "x16" in str(shown) and "<script" not in shown._repr_html_()
    hostile = show_mask(processor, VisionCollator(processor, family)([dict(id="x", messages=[user_message("<script>alert(1)</script>?"), assistant_message("<b>")], images=[])]))
    assert "<script" not in hostile._repr_html_() and "&lt;b&gt;" in hostile._repr_html_()

class Rewritten:
    "A processor whose chat template is another one."
    def __init__(self, processor, write): self.__dict__.update(tokenizer=processor.tokenizer, image_token_id=processor.image_token_id, write=write)
    def apply_chat_template(self, messages, tokenize, add_generation_prompt): return self.write(messages, add_generation_prompt)

def test_a_template_that_rewrites_the_past_is_refused(loaded):
    processor, family = loaded
    def write(messages, opened): # says at the top how many messages there are, as templates that drop old thoughts do
        return f"{len(messages)}\n" + "".join(f"{m['role']}:{m['content'][-1]['text']}<|im_end|>" for m in messages) + ("assistant:" if opened else "")
    with pytest.raises(MedchatError, match="not a prefix"): reply_spans(Rewritten(processor, write), family, CONVERSATIONS[1][0])

def test_a_template_that_never_closes_a_turn_is_refused(loaded):
    processor, family = loaded
    write = lambda messages, opened: "".join(f"{m['role']}:{m['content'][-1]['text']}\n" for m in messages) + ("assistant:" if opened else "")
    with pytest.raises(MedchatError, match="not a prefix"): reply_spans(Rewritten(processor, write), family, CONVERSATIONS[0][0])

def test_a_row_that_is_not_its_conversation_is_refused(loaded):
    processor, family = loaded
    ids = VisionCollator(processor, family)([dict(id="x", messages=CONVERSATIONS[0][0], images=[picture()])])["input_ids"][0].tolist()
    with pytest.raises(MedchatError, match="does not hold the conversation"): make_labels(processor, family, CONVERSATIONS[4][0], ids)

def test_rows_that_teach_nothing_or_everything_are_refused(loaded, monkeypatch):
    processor, family = loaded
    rows = [dict(id="good", messages=CONVERSATIONS[0][0], images=[picture()]), dict(id="bad-7", messages=[user_message("Only a question?", 0)], images=[])]
    with pytest.raises(MedchatError, match="nothing in a record would be learnt: bad-7"): VisionCollator(processor, family)(rows)
    monkeypatch.setattr(module, "make_labels", lambda p, f, m, ids: ids)
    with pytest.raises(MedchatError, match="everything in a record would be learnt: good"): VisionCollator(processor, family)(rows)

def test_nothing_is_cut(loaded):
    processor, family = loaded
    long = dict(id="long-1", messages=[user_message("word "*500, 1), assistant_message("yes")], images=[picture()])
    with pytest.raises(MedchatError, match=r"too long for the base: long-1: \d+ tokens, at most 300"): VisionCollator(processor, family, max_length=300)([long])
    assert VisionCollator(processor, family)([long])["input_ids"].shape[1] > 500

# -- several questions in one conversation

@pytest.mark.parametrize("turns", [1, 2, 3, 10])
def test_joined_turns_lose_and_repeat_nothing(data, turns):
    split = read_dataset(data)["train"]
    joined = join_turns(split, turns, seed=1)
    eq(sorted(i for row in joined for i in row["id"].split("+")), sorted(split["id"]))
    by_id = {r["id"]: r for r in split}
    for row in joined:
        ids = row["id"].split("+")
        assert len(ids) <= turns and len({i.split("-")[0] for i in ids}) == 1
        eq([p["text"] for m in row["messages"] if m["role"] == "assistant" for p in m["content"]], [by_id[i]["messages"][-1]["content"][0]["text"] for i in ids])
        eq([sum(p["type"] == "image" for p in m["content"]) for m in row["messages"]], [1] + [0]*(2*len(ids) - 1))
        eq(row["images"], by_id[ids[0]]["images"])
    eq([r["id"] for r in joined], [r["id"] for r in join_turns(split, turns, seed=1)])
    if turns == 2: assert [r["id"] for r in joined] != [r["id"] for r in join_turns(split, turns, seed=2)]

def test_the_same_file_name_is_not_the_same_image():
    pictures = [[dict(bytes=b"a", path="x.png")], [dict(bytes=b"b", path="x.png")], [], []]
    eq(sorted(plan_turns(pictures, 5)), [[0], [1], [2], [3]])

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
    for part in ("| train records | 24 |", "| steps | 6 |", "trainable parameters", "share of tokens learnt", "image tokens in a conversation | 16 on average", "[["): assert part in text, part

def test_the_first_loss_is_the_cross_entropy_of_the_answers(finished, data, loaded, monkeypatch):
    "Computed by hand on the untouched base: LoRA starts as nothing."
    import torch
    seen = []
    collate = VisionCollator.__call__
    def watch(self, rows):
        if len(rows) == SHORT["batch_size"]: seen.append(rows)
        return collate(self, rows)
    monkeypatch.setattr(VisionCollator, "__call__", watch)
    run = finished.parent/"watched"
    train(data, run=str(run), **{**SHORT, "max_steps": 1, "eval_records": 0})
    model, processor = load_model(BASE)
    batch = VisionCollator(*loaded)(seen[0])
    with torch.no_grad(): logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
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
    strip = lambda rows: [{k: v for k, v in r.items() if k not in ("seconds", "tokens")} for r in rows]
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
    end = time.time() + 120
    while time.time() < end and process.poll() is None and not (run/"log.jsonl").exists() or (run/"log.jsonl").exists() and not read_log(run): time.sleep(.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    eq(process.returncode, 130)
    assert "--resume" in err and "Traceback" not in err, err
    assert last_checkpoint(run) and not (run/"adapter").exists()

def test_other_shards_are_other_data(data, tmp_path):
    other = shutil.copytree(data, tmp_path/"data")
    eq(module.data_hash(other), module.data_hash(data))
    shutil.rmtree(other/"train"); shutil.copytree(other/"test", other/"train")
    assert module.data_hash(other) != module.data_hash(data)

# -- refusals, each before anything is written

def test_a_run_is_never_overwritten(finished, data):
    before = {p: p.stat().st_mtime for p in finished.rglob("*")}
    with pytest.raises(MedchatError, match="already there.*--resume"): train(data, run=str(finished), **SHORT)
    eq({p: p.stat().st_mtime for p in finished.rglob("*")}, before)

def test_a_finished_run_says_so(finished, data, capsys):
    train(data, run=str(finished), **SHORT, resume=True)
    assert "is finished" in capsys.readouterr().out

@pytest.mark.parametrize("change, says", [(dict(learning_rate=1e-3), "another learning_rate: 0.005, now 0.001"), (dict(max_steps=8), "another max_steps"), (dict(seed=1), "another seed"),
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
    (dict(eval_records=-1), "eval_records must not"), (dict(lora_dropout=-.1), "lora_dropout"), (dict(seed=-1), "seed"),
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
    rows = [dict(id=f"r{i}", images=[], turns=[dict(role="user", text="Why?" if i != 37 else "why " * 20000), dict(role="assistant", text="so")], kind="vqa", split="train") for i in range(60)]
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

def test_a_loss_that_is_not_a_number_stops_the_run(data, tmp_path):
    import torch
    from transformers import TrainerCallback
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2: next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(MedchatError, match="loss is no longer a number: step 3"): train(data, run=str(tmp_path/"run"), **SHORT, callbacks=(Poison(),))
    assert not (tmp_path/"run"/"adapter").exists()

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
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address) or (_ for _ in ()).throw(OSError("offline")))
    train(data, run=str(tmp_path/"run"), **{**SHORT, "max_steps": 2})
    out, err = capfd.readouterr()
    eq(len(out.splitlines()), 1); eq(asked, [])
    eq([re.sub(r"\d+\.\d+", "N", line) for line in err.splitlines()], [f"step {i} of 2: validation loss N" for i in (0, 2)]) # no bar without a terminal
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
