"Small datasets and untrained bases for tests of training."
import json
from pathlib import Path
import numpy as np
from PIL import Image

def picture(seed=0, side=112, size=None):
    "Noise, different for each seed."
    width, height = size or (side, side)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width), dtype=np.uint8)).convert("RGB")

def row(name, pairs, images=(), kind="vqa", split="train", **more):
    "A record's line; `pairs` of question and answer."
    return dict(id=name, images=list(images), turns=[dict(role=r, text=t) for pair in pairs for r, t in zip(("user", "assistant"), pair)], kind=kind, split=split, group="+".join(images) or name, **more)

def make_data(folder, rows, sizes={}, **options) -> str:
    "A dataset folder of rows whose images are called 0.png, 1.png, ...; of another size where `sizes` says so."
    from medchat.curate import convert
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name in {i for r in rows for i in r["images"]}: picture(int(Path(name).stem), size=sizes.get(name)).save(folder/name)
    (folder/"records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(convert(folder, format="records", out=folder/"data", **dict(dict(keep_splits=True, max_rejects=1), **options)))

def questions(n=12):
    "Three questions about each of n images: two thirds to learn from, the last two images to test, the two before to validate."
    asked = lambda i: (("Is it large?", "yes" if i % 2 else "no"), ("Where is it?", "left lower lung"), ("What is seen?", "a nodule"))
    return [row(f"{i}-{3*i + k}", [pair], [f"{i}.png"], split="train" if i < n - 4 else "validation" if i < n - 2 else "test", **(dict(answer_type="closed") if not k else {}))
            for i in range(n) for k, pair in enumerate(asked(i))]

def make_base(name, folder) -> str:
    "An untrained base of a family, as a folder that --base takes."
    from medchat.blueprints import BLUEPRINTS
    blueprint = BLUEPRINTS[name]
    processor = blueprint.make_processor()
    blueprint.make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
