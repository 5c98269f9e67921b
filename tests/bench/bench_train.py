"""How fast is a step? Run by hand: python tests/bench/bench_train.py [base] [steps]

Three ways to train the same base on the same phantoms, each in a process of its own, in turns, so that they share the machine's moods:
ours (medchat.train), a bare loop (hand-written PyTorch on the very same batches), and stock (TRL's SFTTrainer with its own collator and its own
random batches; on a CPU with the model's own loss). Prints samples per second and peak memory of each, their ratios, and the share of time that our loop waits for data."""
import json, os, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path

BATCH, ROUNDS, SKIP = 16, 3, 5 # conversations in a step; turns; first steps that are not counted
SETTINGS = dict(kinds="vqa", turns_per_image=8, vision_layers=True, batch_size=BATCH, gradient_accumulation=1, learning_rate=2e-3, eval_records=0, answer_records=0, save_steps=10_000)

def held(pid): return next((int(line.split()[1]) / 1024 for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:")), 0) # MB, pages that processes share counted once

class Peak(threading.Thread):
    "The most memory that this process and its children held, looked at five times a second."
    def __init__(self): super().__init__(daemon=True); self.most = 0; self.start()
    def run(self):
        while True:
            total = 0
            for pid in [os.getpid(), *open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()]:
                try: total += held(pid)
                except OSError: pass # it has just ended
            self.most = max(self.most, total); time.sleep(.2)

def ours(data, base, steps, out):
    from transformers import TrainerCallback
    from torch.utils.data.dataloader import _BaseDataLoaderIter as Loader
    from medchat.train import train
    times, waited, following = [], [], Loader.__next__
    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__): times.append(time.perf_counter())
    def timed(self):
        start = time.perf_counter()
        try: return following(self)
        finally: waited.append((start, time.perf_counter() - start))
    Loader.__next__ = timed # how long the loop stands still until its batch is there
    train(data, run=str(out/"run"), base=base, max_steps=steps, callbacks=[Clock()], **SETTINGS)
    span = times[-1] - times[SKIP - 1]
    return span, (steps - SKIP) * BATCH, sum(s for at, s in waited if at > times[SKIP - 1]) / span

def pieces(data, base, steps):
    from medchat.batches import VisionCollator, count_tokens, plan_steps
    from medchat.families import family_of
    from medchat.models import add_lora, load_model
    from medchat.train import read_lessons
    _, lessons = read_lessons(dict(data=data, stage="instruct", seed=3407, **{k: SETTINGS[k] for k in ("kinds", "turns_per_image")}))
    model, processor = load_model(base, for_training=True)
    model = add_lora(model, vision_layers=True)
    return model, VisionCollator(processor, family_of(model.config)), lessons, plan_steps(count_tokens(processor, lessons), [list(range(len(lessons)))], BATCH, 1, steps)

def bare(data, base, steps, out):
    import torch
    model, collate, lessons, plan = pieces(data, base, steps)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser, times = torch.optim.AdamW(learnt, lr=2e-3), []
    for rows in plan:
        batch = collate([lessons[i] for i in rows]); batch.pop("ids")
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.)
        optimiser.step(); optimiser.zero_grad()
        times.append(time.perf_counter())
    return times[-1] - times[SKIP - 1], (steps - SKIP) * BATCH, None

def stock(data, base, steps, out):
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    model, collate, lessons, _ = pieces(data, base, steps)
    def shape(row): # what TRL's collator for images takes
        from PIL import Image
        import io
        return dict(messages=[dict(role=m["role"], content=[{k: v for k, v in p.items() if v is not None} for p in m["content"]]) for m in row["messages"]],
            images=[Image.open(io.BytesIO(i["bytes"])) if i["bytes"] else Image.open(i["path"]) for i in row["images"]])
    from datasets import Dataset
    def read(batch):
        shaped = [shape(lessons[i]) for i in batch["row"]]
        return {name: [s[name] for s in shaped] for name in ("messages", "images")}
    rows = Dataset.from_dict(dict(row=list(range(len(lessons))))).with_transform(read)
    times = []
    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__): times.append(time.perf_counter())
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
    class Stock(SFTTrainer): compute_loss = Trainer.compute_loss # its own one is a Triton kernel, which a CPU can only interpret (40 steps were not done after five minutes): the model's loss takes its place
    trainer = Stock(model=model, args=SFTConfig(output_dir=str(out/"stock"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=2e-3, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False, bf16=False), processing_class=collate.processor, train_dataset=rows, callbacks=[Clock()],
        data_collator=DataCollatorForVisionLanguageModeling(collate.processor))
    for p in trainer.model.parameters():
        if p.requires_grad: p.data = p.data.float() # TRL makes them 16-bit, which a CPU refuses
    trainer.train()
    return times[-1] - times[SKIP - 1], (steps - SKIP) * BATCH, None

def child(way, data, base, steps):
    memory = Peak()
    with tempfile.TemporaryDirectory() as out: seconds, samples, waiting = dict(ours=ours, bare=bare, stock=stock)[way](data, base, steps, Path(out))
    print("RESULT", json.dumps(dict(rate=samples/seconds, peak=memory.most, waiting=waiting)))

def main(base="tiny-qwen2-vl", steps="40"):
    from medchat.core import sample_data
    from medchat.curate import convert
    with tempfile.TemporaryDirectory() as place:
        data, seen = str(convert(sample_data()/"phantoms", f"{place}/data", keep_splits=True)), {}
        for turn in range(ROUNDS):
            for way in ("ours", "bare", "stock"):
                done = subprocess.run([sys.executable, __file__, "--child", way, data, base, steps], capture_output=True, text=True)
                found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
                if not found: print(f"{way} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"); continue
                seen.setdefault(way, []).append(json.loads(found[0][7:]))
    middle = lambda way, what: statistics.median(r[what] for r in seen[way])
    for way in seen: print(f"{way:6} {middle(way, 'rate'):7.1f} samples/s   peak {middle(way, 'peak'):6.0f} MB   rounds: {', '.join(format(r['rate'], '.1f') for r in seen[way])}")
    for way in ("bare", "stock"):
        if way in seen: print(f"ours / {way}: {statistics.median(a['rate']/b['rate'] for a, b in zip(seen['ours'], seen[way])):.2f} of its speed, {middle('ours', 'peak')/middle(way, 'peak'):.2f} of its memory")
    print(f"waiting for data: {statistics.median(r['waiting'] for r in seen['ours']):.1%} of the time of a step; {base}, {steps} steps of {BATCH}, {os.cpu_count()} cores")

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]: child(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else: main(*sys.argv[1:])
