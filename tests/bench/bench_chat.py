"""Time to first token of turn 2: the chat's kept memory against stock `model.generate` on the whole history. Same weights, same question, greedy; the replies are compared.

python tests/bench/bench_chat.py [--rounds 9] [--bases tiny-qwen2-vl ...]

Both are asked for one token (max_new_tokens=1) and timed from messages and images to text. `stock` opens, resizes and tokenises, then generates; `stock, batch ready` counts only its
`generate`, as if tensors had been kept. Ours writes the prompt, tokenises, starts its thread and reads what is new. In each round turn 1 is answered anew, untimed, and the three follow each other in changing order.

The tiny bases as shipped see at most 20 (Qwen2-VL), 88 (LLaVA) and 68 (Llama) vectors of an image. To give them 1,000 and more:
Qwen2-VL: the image processor's limit is raised to 1,100 tokens, the image is 924 x 924. No weight is touched.
LLaVA: 448 x 448 is added to the AnyRes shapes, 8 x 8 tiles of 56 pixels. No weight is touched.
Llama: a copy with tiles of 224 pixels instead of 56, its two tables of patch positions interpolated (4 x 4 to 16 x 16); four tiles make 4 x 257 vectors for its cross-attention. All other weights are the shipped ones.
"""
import argparse, json, os, shutil, sys, tempfile, time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
from PIL import Image
from medchat.engines import LocalEngine
from medchat.messages import assistant_message, user_message
from medchat.models import encode, greedy, load_model, resolve_base
from medchat.shapes import draw_shapes

def wider(positions, n):
    "A table of patch positions (… x (1 + 4*4) x width) for n x n patches; the class token keeps its own."
    import torch
    grid = positions[..., 1:, :].float().reshape(-1, 4, 4, positions.shape[-1]).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(n, n), mode="bilinear").permute(0, 2, 3, 1).reshape(*positions.shape[:-2], n*n, positions.shape[-1])
    return torch.cat([positions[..., :1, :], grid.to(positions.dtype)], -2).contiguous()

def big_tiles(base, place, pixels=224):
    "A copy of the tiny Llama with larger tiles."
    from safetensors.torch import load_file, save_file
    folder = Path(shutil.copytree(resolve_base(base), Path(place)/base))
    config, processor = (json.loads((folder/name).read_text()) for name in ("config.json", "processor_config.json"))
    vision, weights = config["vision_config"], load_file(folder/"model.safetensors")
    vision["image_size"], processor["image_processor"]["size"] = pixels, dict(height=pixels, width=pixels)
    for name, w in weights.items():
        if name.endswith("gated_positional_embedding.embedding"): weights[name] = wider(w, pixels//14)
        if name.endswith("gated_positional_embedding.tile_embedding.weight"): weights[name] = wider(w.view(len(w), vision["max_num_tiles"], 17, -1), pixels//14).flatten(1)
    save_file(weights, folder/"model.safetensors", metadata=dict(format="pt"))
    (folder/"config.json").write_text(json.dumps(config)); (folder/"processor_config.json").write_text(json.dumps(processor))
    return str(folder)

def prepare(base, place):
    "Model, processor and the side of an image of 1,000 tokens and more."
    if "llama" in base: return *load_model(big_tiles(base, place)), 448
    model, processor = load_model(base)
    if "qwen" in base: processor.image_processor.size["longest_edge"] = 1100*784; return model, processor, 924
    shapes = [*model.config.image_grid_pinpoints, [448, 448]]
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = shapes
    return model, processor, 448

def image_vectors(engine, memory):
    "How many vectors of the image the layers keep, among the words or beside them."
    across = getattr(engine.model.config.get_text_config(), "cross_attention_layers", None)
    mark = engine.processor.tokenizer.convert_tokens_to_ids(engine.processor.image_token)
    return memory.cache.layers[across[0]].keys.shape[-2] if across else memory.ids.count(mark)

def stock(engine, messages, images, n):
    "The whole history by `generate`: the reply, and when the batch was ready."
    import torch
    batch = encode(engine.processor, [messages], [images])
    ready = time.perf_counter()
    with torch.no_grad(): out = engine.model.generate(**batch, generation_config=greedy(engine.processor, n, engine.model.generation_config.eos_token_id))
    return engine.processor.tokenizer.decode(out[0, batch["input_ids"].shape[1]:], skip_special_tokens=True).strip(), ready

def one_round(engine, first, picture, second, ours_first):
    "Seconds to the first token of turn 2: ours, stock, and stock from a ready batch."
    memory = engine.new_memory()
    "".join(engine.stream(first, [picture], 16, memory=memory))
    took = {}
    for way in ("ours", "stock") if ours_first else ("stock", "ours"):
        start = time.perf_counter()
        if way == "ours": said = "".join(engine.stream(second, [picture], 1, memory=memory))
        else: whole, ready = stock(engine, second, [picture], 1)
        took[way] = time.perf_counter() - start
        if way == "stock": took["ready"] = time.perf_counter() - ready
    assert said == whole, (said, whole)
    return took

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--bases", nargs="+", default=["tiny-qwen2-vl", "tiny-llama-3.2-vision", "tiny-llava-1.6"])
    a = p.parse_args()
    import torch
    print(f"{a.rounds} rounds, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as place:
        for base in a.bases:
            model, processor, side = prepare(base, place)
            engine, picture = LocalEngine(model, processor, base), Image.fromarray(draw_shapes(np.random.default_rng(4))[0]).convert("RGB").resize((side, side))
            memory, first = engine.new_memory(), [user_message("What is in the left upper area?", 1)]
            said = "".join(engine.stream(first, [picture], 16, memory=memory))
            vectors, before = image_vectors(engine, memory), len(memory.ids)
            assert vectors >= 1000, vectors
            second = [*first, assistant_message(said or "nothing"), user_message("And in the right upper area?")]
            again = "".join(engine.stream(second, [picture], 16, memory=memory))
            assert again == stock(engine, second, [picture], 16)[0], "another answer than by generate"
            prompt = encode(processor, [second], [[picture]])["input_ids"].shape[1]
            for k in range(2): one_round(engine, first, picture, second, k) # warm
            rounds = [one_round(engine, first, picture, second, k % 2) for k in range(a.rounds)]
            print(f"\n{base}: {side} x {side} pixels, {vectors} vectors of the image; prompt of turn 2: {prompt} tokens, {prompt - before} of them after what turn 1 left; both say {again!r}")
            for name, key in (("stock", "stock"), ("stock, batch ready", "ready")):
                ratios = [r["ours"]/r[key] for r in rounds]
                print(f"  ours / {name:18} {median(ratios):.3f}  (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
            print(f"  milliseconds, median: ours {1e3*median(r['ours'] for r in rounds):.0f}, stock {1e3*median(r['stock'] for r in rounds):.0f}, of that generate {1e3*median(r['ready'] for r in rounds):.0f}")

if __name__ == "__main__": main()
