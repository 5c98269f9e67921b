"""What only a CUDA GPU can show: python tests/gpu/checks.py [base]

Each check runs in a process of its own. The last lines are one table: check, result, figures."""
import json, os, subprocess, sys, tempfile, time
from pathlib import Path

STEPS = 20
SETTINGS = dict(kinds="vqa", max_steps=STEPS, batch_size=8, gradient_accumulation=1, learning_rate=2e-4, eval_records=0, answer_records=0)

def _data(place):
    from medchat.core import sample_data
    from medchat.curate import convert
    return str(convert(sample_data()/"phantoms", Path(place)/"data", keep_splits=True))

def losses(backend, base, place):
    "The losses of 20 steps by one backend."
    import medchat.models as models
    if backend == "transformers": models.find_spec = lambda name: None # as if unsloth were not installed
    from medchat.plots import read_log
    from medchat.train import train
    run = train(_data(place), run=f"{place}/run", base=base, **SETTINGS)
    return [r["loss"] for r in read_log(run)]

def agree(base, place):
    "Unsloth and transformers + PEFT, the same base, data, seed and steps: the losses side by side."
    one, two = (call("losses", backend, base) for backend in ("unsloth", "transformers"))
    gap = max(abs(a - b) for a, b in zip(one, two))
    assert gap < .05 * max(one), (one, two)
    return dict(steps=len(one), largest_gap=round(gap, 4), first=round(one[0], 3), last=round(one[-1], 3))

def way(base, place):
    "Load, train, answer, save, load again, merge: the whole way."
    import torch
    from medchat.evaluate import evaluate
    from medchat.models import load_run
    from medchat.train import train
    start, data = time.time(), _data(place)
    run = train(data, run=f"{place}/run", base=base, **SETTINGS)
    score = evaluate([run], data, limit=32)[0]["tuned"]["closed_accuracy"]
    model, processor = load_run(run)
    merged = model.merge_and_unload()
    merged.save_pretrained(f"{place}/merged"); processor.save_pretrained(f"{place}/merged")
    return dict(closed_accuracy=score["value"], n=score["n"], minutes=round((time.time() - start)/60, 1), peak_gb=round(torch.cuda.max_memory_allocated()/1e9, 2), merged=sorted(p.suffix for p in Path(f"{place}/merged").glob("*.safetensors"))[:1])

def ours(base, place):
    "Samples a second and peak memory of our training."
    import torch
    from medchat.plots import read_log
    from medchat.train import train
    run = train(_data(place), run=f"{place}/run", base=base, **SETTINGS)
    log = [r for r in read_log(run) if "loss" in r]
    return dict(rate=SETTINGS["batch_size"] * (len(log) - 5) / (log[-1]["seconds"] - log[4]["seconds"]), peak_gb=torch.cuda.max_memory_allocated()/1e9)

def recipe(base, place):
    "The same by Unsloth's own recipe: its collator, TRL's trainer, nothing of ours but the data."
    from unsloth import FastVisionModel
    from unsloth.trainer import UnslothVisionDataCollator
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from medchat.curate import read_dataset
    from medchat.images import load_image
    from medchat.models import resolve_base
    model, processor = FastVisionModel.from_pretrained(resolve_base(base), load_in_4bit=True, use_gradient_checkpointing="unsloth")
    model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False, finetune_language_layers=True, finetune_attention_modules=True, finetune_mlp_modules=True, r=16, lora_alpha=16, random_state=3407)
    FastVisionModel.for_training(model)
    split = read_dataset(_data(place))["train"]
    vqa = [i for i, k in enumerate(split["kind"]) if k == "vqa"][:SETTINGS["batch_size"] * STEPS]
    def shape(row): # pictures inside the messages, as that collator wants them
        pictures = iter(row["images"])
        return dict(messages=[dict(role=m["role"], content=[dict(type="image", image=load_image(next(pictures))) if p["type"] == "image" else dict(type="text", text=p["text"]) for p in m["content"]]) for m in row["messages"]])
    times = []
    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__): times.append(time.perf_counter())
    SFTTrainer(model=model, train_dataset=[shape(split[i]) for i in vqa], data_collator=UnslothVisionDataCollator(model, processor), processing_class=processor.tokenizer, callbacks=[Clock()], args=SFTConfig(
        output_dir=f"{place}/stock", max_steps=STEPS, per_device_train_batch_size=SETTINGS["batch_size"], learning_rate=2e-4, optim="adamw_8bit", bf16=torch.cuda.is_bf16_supported(), report_to="none", save_strategy="no",
        remove_unused_columns=False, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True}, max_length=2048)).train()
    return dict(rate=SETTINGS["batch_size"] * (STEPS - 5) / (times[-1] - times[4]), peak_gb=torch.cuda.max_memory_allocated()/1e9)

def speed(base, place):
    "Ours against Unsloth's recipe; the goal is 1.0 or better."
    a, b = call("ours", base), call("recipe", base)
    return dict(ours=round(a["rate"], 2), recipe=round(b["rate"], 2), ratio=round(a["rate"]/b["rate"], 2), memory_ratio=round(a["peak_gb"]/b["peak_gb"], 2))

def call(check, *args):
    "Run a function of this file in a fresh process, in a fresh folder."
    done = subprocess.run([sys.executable, __file__, "--one", check, *args], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found: raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(found[-1][7:])

def main(*bases):
    import torch
    from medchat.families import FAMILIES
    if not torch.cuda.is_available(): sys.exit("no CUDA GPU here: these checks need one")
    print(torch.cuda.get_device_name(0), "|", "torch", torch.__version__)
    rows, failed = [], False
    for base in [*(f.tiny_base for f in FAMILIES.values() if f.tiny_base), *bases]:
        for check in ("agree", "way", "speed"):
            try: rows.append((base, check, "ok", json.dumps(call(check, base))))
            except Exception as e: rows.append((base, check, "FAILED", str(e)[:200])); failed = True
            print(" | ".join(rows[-1]), flush=True)
    width = [max(len(r[i]) for r in rows) for i in range(3)]
    print("\n" + "\n".join("  ".join(c.ljust(w) for c, w in zip(r, [*width, 0])) for r in rows))
    sys.exit(failed)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        with tempfile.TemporaryDirectory() as place: print("RESULT", json.dumps(globals()[sys.argv[2]](*sys.argv[3:], place)))
    else: main(*sys.argv[1:])
