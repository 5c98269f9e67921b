"""Speed and memory of `medchat convert`, as ratios within one run. By hand: .venv/bin/python tests/bench/bench_convert.py [--rows 100000]

Speed: films of 1024 x 1024 pixels as JPEG, one question each, converted with every picture decoded, and with headers only, against a bare
decode of the same files by Pillow in as many processes. The three take turns; the medians are compared.
Memory: the peak of a conversion in a process of its own, for 1,000, 10,000 and 100,000 rows with a small picture each, beside the list
comprehension of the tutorials, which holds every decoded picture.
"""
import argparse, json, os, random, shutil, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
import numpy as np
from PIL import Image

def make_films(folder: Path, n: int, side: int, quality: int = 90):
    "n different films of side x side pixels and a records.jsonl with one question each."
    from medchat.samples import draw_phantom
    (folder/"images").mkdir(parents=True)
    drawn = [Image.fromarray(draw_phantom({}, patient=i)).resize((side, side)) for i in range(min(n, 40))]
    rng = np.random.default_rng(0)
    with open(folder/"records.jsonl", "w") as f:
        for i in range(n):
            film = np.asarray(drawn[i % len(drawn)], np.int16) + rng.integers(-9, 10, (side, side), np.int16) + i % 7
            Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(folder/f"images/{i:06d}.jpg", quality=quality)
            f.write(json.dumps(dict(image_path=f"images/{i:06d}.jpg", instruction="Is the heart enlarged?", context="", response="yes" if i % 2 else "no", group=f"p{i}")) + "\n")

def decode(path: str) -> int:
    with Image.open(path) as im: im.load()
    return im.width

def seconds(work) -> float:
    start = time.perf_counter(); work(); return time.perf_counter() - start

def speed(home: Path, n: int, processes: int, rounds: int):
    from medchat.curate import convert
    make_films(home/"films", n, 1024)
    files = sorted(map(str, (home/"films/images").iterdir()))
    def converted(verify):
        with open(os.devnull, "w") as null, redirect_stdout(null): convert(str(home/"films"), home/"out", "records", verify=verify, num_proc=processes, force=True)
    def bare():
        for _ in pool.map(decode, files, chunksize=8): pass
    took = {"bare decode": [], "full": [], "header": []}
    with ProcessPoolExecutor(processes) as pool:
        bare(); converted("full") # everything is imported and in the file cache
        for _ in range(rounds):
            for name, work in (("bare decode", bare), ("full", lambda: converted("full")), ("header", lambda: converted("header"))): took[name].append(seconds(work))
    rate = {k: n / statistics.median(v) for k, v in took.items()}
    for k, v in took.items(): print(f"{k:12} {rate[k]:8.0f} records/s   {rate[k] / rate['bare decode']:.2f} of the bare decode   ({min(v):.2f} to {max(v):.2f} s)")

PEAK = "import resource; print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
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
    said = subprocess.run([sys.executable, "-c", code, *map(str, args)], text=True, capture_output=True, env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH","") + ":" + str(Path(__file__).resolve().parents[2])})
    return float(said.stdout.rpartition("PEAK ")[2]) if said.returncode == 0 else float("nan")

def memory(home: Path, sizes: list[int], side: int):
    first = None
    for n in sizes:
        make_films(home/f"m{n}", n, side, quality=60)
        start = time.perf_counter(); p = peak(CONVERT, home/f"m{n}", home/"out"); took = time.perf_counter() - start
        first = first or p
        print(f"{n:>8,} rows   peak {p:6.0f} MB   {p / first:.2f} of the first   {n / took:6.0f} records/s" + (f"   list comprehension {peak(TUTORIAL, home/f'm{n}'):6.0f} MB" if n <= 10_000 else ""))
        shutil.rmtree(home/f"m{n}"); shutil.rmtree(home/"out")

if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--films", type=int, default=400); args.add_argument("--rows", type=int, default=100_000)
    args.add_argument("--processes", type=int, default=2); args.add_argument("--rounds", type=int, default=5); args.add_argument("--side", type=int, default=112)
    args = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{args.films} films of 1024 x 1024 pixels, {args.processes} processes, {args.rounds} rounds")
        speed(Path(folder), args.films, args.processes, args.rounds)
        print(f"one film of {args.side} x {args.side} pixels a row")
        memory(Path(folder), [n for n in (1_000, 10_000, 100_000) if n <= args.rows], args.side)
