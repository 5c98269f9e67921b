"Run folders for tests: a hollow one with the right files, and a real one with a PEFT adapter on the tiny base."
import json
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

base = "tiny-qwen2-vl"


def make_hollow_run(run: Path, **config) -> Path:
    "All files of a run, none of them a model; some that must never leave the machine."
    config = dict(medchat="0.1.0", base=base, base_sha256="0" * 64, data=str(run.parent/"secret-ward"/"phantoms"), run=str(run), r=16, lora_alpha=16, learning_rate=2e-4,
                  max_steps=300, seed=3407, user="ada", host="ward7", versions={"torch": "2.14.1", "peft": "0.21.2"}, records={"train": 2400, "test": 600}) | config
    score = lambda v: dict(value=v, n=200, groups=150, low=v - .05, high=v + .05)
    text = {"config.json": json.dumps(config), "adapter/adapter_config.json": json.dumps(dict(peft_type="LORA", base_model_name_or_path=str(run.parent/base))),
            "adapter/processor_config.json": "{}", "adapter/tokenizer.json": "{}", "adapter/chat_template.jinja": "{{ messages }}", "adapter/README.md": "PEFT's own card",
            "eval/test.json": json.dumps(dict(data=str(run.parent/"secret-ward"/"phantoms"), base=dict(closed_accuracy=score(.5)), tuned=dict(closed_accuracy=score(.91), open_recall=dict(value=None, n=0)),
                always_same=dict(closed_accuracy=.62), slices=[dict(by="type", name="effusion", base=dict(closed_accuracy=score(.4)), tuned=dict(closed_accuracy=score(.8)))],
                texts=dict(base=dict(caption=dict(rouge_l=score(.1), bleu_2=score(.1))), tuned=dict(caption=dict(rouge_l=score(.3), bleu_2=score(.2)))),
                mistakes=dict(tuned=dict(hallucinations=dict(said_wrong=score(.25), missed=score(.5), examples=[dict(id="miller-1", invented=["Edema"], missed=[])]), sides=None)), calibration=dict(tuned=None),
                wording=dict(all_agree=score(.7), examples=[dict(question="Is Mr Miller well?", reply="yes")]), warnings=["closed accuracy is 0.91 with the right image and 0.90 with a blank image: nothing shows that it looks"],
                looks=dict(blank=dict(closed_accuracy=score(.9) | dict(drop=dict(value=.01, low=-.02, high=.04, p=.6)))), judge=dict(tuned=dict(relative=score(.5), order_changed=score(.1), model="m", host="ward-gpu", ratings=[1], places=[0])))),
            "eval/test.jsonl": '{"reply": "a patient\'s answer"}\n', "log.jsonl": "{}\n", "receipt.md": "a patient's words", "checkpoints/checkpoint-9/optimizer.pt": "x"}
    for name, content in text.items():
        (run/name).parent.mkdir(parents=True, exist_ok=True)
        (run/name).write_text(content)
    for name in ("adapter/training_args.bin", "loss.png", "loss.svg"): (run/name).write_bytes(b"\x89PNG" + bytes(60))
    save_file({"lora": np.arange(4096, dtype=np.float32)}, run/"adapter/adapter_model.safetensors")
    return run


def make_run(run: Path, seed: int = 0) -> Path:
    "A real run: LoRA on the tiny base, with weights that change its answers."
    import torch
    from medchat import __version__
    from medchat.models import add_lora, base_hash, load_model, resolve_base
    model, processor = load_model(base)
    model = add_lora(model, r=8, vision_layers=True, seed=seed)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name: p.data.normal_(0, .3)
    make_hollow_run(run, medchat=__version__, base_sha256=base_hash(resolve_base(base)), load_in_4bit=True, r=8)
    for p in (run/"adapter").iterdir(): p.unlink()
    model.save_pretrained(str(run/"adapter"))
    processor.save_pretrained(str(run/"adapter"))
    return run
