"""Questions a second: `medchat evaluate`'s way against one-by-one `generate`, as tutorials do it. Same weights, same questions, greedy; the replies are compared.

python tests/bench/bench_evaluate.py [--questions 300] [--rounds 3] [--bases tiny-qwen2-vl ...]
"""
import argparse, sys, tempfile, time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from medchat.answers import answer_questions, read_questions
from medchat.core import sample_data
from medchat.curate import convert, read_dataset
from medchat.images import load_image
from medchat.models import load_model

def one_by_one(model, processor, dataset, questions, longest):
    "A tutorial's loop: open the image, apply the template, generate, decode."
    import torch
    replies = []
    for q in questions:
        images = [load_image(i) for i in dataset[q.row]["images"]]
        content = [[{k: v for k, v in part.items() if v is not None} for part in m["content"]] for m in q.prompt]
        text = processor.apply_chat_template([dict(role=m["role"], content=c) for m, c in zip(q.prompt, content)], add_generation_prompt=True)
        inputs = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt").to(model.device)
        with torch.no_grad(): out = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        replies.append(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
    return replies

def timed(work):
    start = time.perf_counter()
    return work(), time.perf_counter() - start

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--questions", type=int, default=300)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--bases", nargs="+", default=["tiny-qwen2-vl", "tiny-llama-3.2-vision", "tiny-llava-1.6"])
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as place:
        dataset = read_dataset(convert(sample_data()/"phantoms", Path(place)/"data", keep_splits=True), "test")
        questions = [q for q in read_questions(dataset) if q.kind == "vqa"][:a.questions]
        print(f"{len(questions)} questions about {len({tuple(q.image_paths) for q in questions})} images, batches of {a.batch_size}, {a.rounds} rounds")
        for base in a.bases:
            model, processor = load_model(base)
            ways = dict(alone=lambda: one_by_one(model, processor, dataset, questions, 32), ours=lambda: [r.reply for r in answer_questions(model, processor, dataset, questions, batch_size=a.batch_size)])
            ratios, same, speeds = [], [], []
            for k in range(a.rounds):
                took = {name: timed(ways[name]) for name in (list(ways) if k % 2 else list(ways)[::-1])}
                ratios.append(took["alone"][1]/took["ours"][1]); speeds.append(len(questions)/took["ours"][1])
                same.append(sum(x == y for x, y in zip(took["alone"][0], took["ours"][0])))
            print(f"{base:24} {median(ratios):.1f} times as many questions a second (rounds: {', '.join(f'{r:.1f}' for r in ratios)}); {median(speeds):.0f} a second; the same reply to {min(same)} of {len(questions)}")

if __name__ == "__main__": main()
