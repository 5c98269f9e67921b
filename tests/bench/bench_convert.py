"""Speed and memory of `medchat convert`, as ratios within one run. By hand: .venv/bin/python tests/bench/bench_convert.py [--rows 100000]

Speed: pictures of 1024 and 2048 pixels (or the folder that --images names), one question each, converted with every picture decoded,
and with headers only, against a bare decode of the same files by Pillow in as many processes. The three take turns; the medians are compared.
Memory: the peak of a conversion in a process of its own, for 1,000, 10,000 and 100,000 rows with a small picture each, beside the list
comprehension of the tutorials, which holds every decoded picture.
"""
import argparse, json, os, shutil, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
import numpy as np
from PIL import Image

def make_films(folder: Path, n: int, side: int, kind: str = "jpg"):
    "n different pictures of side x side pixels and a records.jsonl with one question each."
    (folder/"images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 2, (side, side)) # film grain: a 1024-pixel JPEG of quality 90 takes about 100 kB
    with open(folder/"records.jsonl", "w") as f:
        for i in range(n):
            coarse, fine = (np.asarray(Image.fromarray(rng.integers(0, 256, (k, k), np.uint8)).resize((side, side), Image.Resampling.BICUBIC), np.float32) for k in (7, 60))
            film = Image.fromarray((0.8 * coarse + 0.2 * fine + np.roll(grain, i, 0)).clip(0, 255).astype(np.uint8))
            film.save(folder/f"images/{i:06d}.{kind}", **dict(quality=90) if kind == "jpg" else dict(compress_level=6))
            f.write(json.dumps(dict(image_path=f"images/{i:06d}.{kind}", instruction="Is the heart enlarged?", context="", response="yes" if i % 2 else "no", group=f"p{i}")) + "\n")

def copy_images(folder: Path, images: Path, copies: int):
    "The same with the pictures of a folder, each some times under other names and with another question."
    (folder/"images").mkdir(parents=True)
    files = sorted(f for f in images.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    with open(folder/"records.jsonl", "w") as out:
        for k in range(copies):
            for f in files:
                shutil.copyfile(f, folder/"images"/f"{k}-{f.name}")
                out.write(json.dumps(dict(image_path=f"images/{k}-{f.name}", instruction=f"Question {k}?", context="", response="yes", group=f.name)) + "\n")

def decode(path: str) -> int:
    with Image.open(path) as im: im.load()
    return im.width

def seconds(work) -> float:
    start = time.perf_counter(); work(); return time.perf_counter() - start

def speed(source: Path, out: Path, processes: int, rounds: int):
    from medchat.curate import convert
    files = sorted(map(str, (source/"images").iterdir()))
    size = sum(map(os.path.getsize, files)) / len(files) / 1000
    print(f"{source.name}: {len(files)} pictures, {size:.0f} kB each on average, {processes} processes, {rounds} rounds")
    def converted(verify):
        with open(os.devnull, "w") as null, redirect_stdout(null): convert(str(source), out, "records", verify=verify, num_proc=processes, force=True)
    def bare():
        for _ in pool.map(decode, files, chunksize=8): pass
    took = {"bare decode": [], "full": [], "header": []}
    with ProcessPoolExecutor(processes) as pool:
        bare(); converted("header") # everything is imported and in the file cache
        for _ in range(rounds):
            for name, work in (("bare decode", bare), ("full", lambda: converted("full")), ("header", lambda: converted("header"))): took[name].append(seconds(work))
    rate = {k: len(files) / statistics.median(v) for k, v in took.items()}
    for k, v in took.items(): print(f"  {k:12} {rate[k]:7,.0f} records/s   {rate[k] / rate['bare decode']:5.2f} of the bare decode   ({min(v):.2f} to {max(v):.2f} s)")
    shutil.rmtree(source); shutil.rmtree(out)

PEAK = "print('PEAK', next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
CONVERT = "import sys; from medchat.curate import convert; convert(sys.argv[1], sys.argv[2], 'records', num_proc=2, force=True); " + PEAK
TUTORIAL = """import json, sys
from pathlib import Path
from PIL import Image
home = Path(sys.argv[1])
def to_messages(row):
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": row["instruction"]}, {"type": "image", "image": Image.open(home/row["image_path"]).convert("RGB")}]},
                         {"role": "assistant", "content": [{"type": "text", "text": row["response"]}]}]}
data = [to_messages(json.loads(line)) for line in open(home/"records.jsonl")]
""" + PEAK

def peak(code: str, *args) -> float: # MB
    said = subprocess.run([sys.executable, "-c", code, *map(str, args)], text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    return float(said.stdout.rpartition("PEAK ")[2]) if said.returncode == 0 else float("nan")

def memory(home: Path, sizes: list[int], side: int):
    first = None
    for n in sizes:
        make_films(home/f"m{n}", n, side)
        start = time.perf_counter(); p = peak(CONVERT, home/f"m{n}", home/"out"); took = time.perf_counter() - start
        first = first or p
        print(f"{n:>8,} rows   peak {p:6.0f} MB   {p / first:.2f} of the first   {n / took:6.0f} records/s" + (f"   list comprehension {peak(TUTORIAL, home/f'm{n}'):6.0f} MB" if n <= 10_000 else ""))
        shutil.rmtree(home/f"m{n}"); shutil.rmtree(home/"out")

if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--n", type=int, default=2000, help="pictures of 1024 x 1024 pixels; a quarter as many of 2048 x 2048"); args.add_argument("--images", type=Path, help="a folder of pictures instead"); args.add_argument("--copies", type=int, default=1, help="of each of them")
    args.add_argument("--rows", type=int, default=100_000, help="most rows for the memory; 0 leaves it out"); args.add_argument("--side", type=int, default=112)
    args.add_argument("--processes", type=int, default=2); args.add_argument("--rounds", type=int, default=3)
    args = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if args.images: copy_images(home/args.images.name, args.images, args.copies); speed(home/args.images.name, home/"out", args.processes, args.rounds)
        else:
            for name, n, side, kind in (("JPEG 1024", args.n, 1024, "jpg"), ("JPEG 2048", args.n // 4, 2048, "jpg"), ("PNG 1024", args.n // 4, 1024, "png")):
                make_films(home/name, n, side, kind); speed(home/name, home/"out", args.processes, args.rounds)
        if args.rows:
            print(f"one picture of {args.side} x {args.side} pixels a row")
            memory(home, [n for n in (1_000, 10_000, 100_000) if n <= args.rows], args.side)
