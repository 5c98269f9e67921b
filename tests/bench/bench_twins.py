"""How fast are fingerprints and the search for twins? Run by hand: python tests/bench/bench_twins.py [folder of JPEG files]

Prints ratios of one run: fingerprint / decoding of the same files, and seconds and peak memory of the search at 1,000,
10,000 and 100,000 pictures (random hashes, a quarter of their bits shared as look-alikes have, and 1% planted copies)."""
import io, resource, subprocess, sys, time
from pathlib import Path
import numpy as np
from PIL import Image
from medchat.samples import draw_phantom
from medchat.twins import FINGERPRINT_BYTES, find_twins, fingerprint, twin_groups

def peak() -> float: # MB
    try: return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def best(f, n=5): # seconds of processor time, so that other work on the machine counts little
    def once(): start = time.process_time(); f(); return time.process_time() - start
    return min(once() for _ in range(n))

def drawn(size, n=16):
    rng = np.random.default_rng(0)
    for p in range(n):
        a = np.asarray(Image.fromarray(draw_phantom({}, patient=p)).resize((size, size), Image.Resampling.BICUBIC), float) + rng.normal(0, 4, (size, size))
        f = io.BytesIO(); Image.fromarray(np.uint8(np.clip(a, 0, 255))).convert("RGB").save(f, "JPEG", quality=90); yield f.getvalue()

def cost(name, files):
    ims = [Image.open(io.BytesIO(f)) for f in files]
    for im in ims: im.load()
    decode, finger = best(lambda: [Image.open(io.BytesIO(f)).load() for f in files]), best(lambda: [fingerprint(im) for im in ims])
    print(f"{name:28} decoding {decode / len(files) * 1e3:7.2f} ms   fingerprint {finger / len(files) * 1e3:6.2f} ms   ratio {finger / decode:.3f}")

def made(n, seed=0):
    "n fingerprints of different pictures (smooth noise as thumbnails), the last 1% copies of the first."
    rng, all_ = np.random.default_rng(seed), np.empty((n, FINGERPRINT_BYTES), np.uint8)
    share = rng.integers(0, 256, 32, dtype=np.uint8)
    keep = np.packbits(rng.random(256) < .25)
    all_[:, :32] = rng.integers(0, 256, (n, 32), dtype=np.uint8)
    all_[:, :32] = all_[:, :32] & ~keep | share & keep
    for k in range(0, n, 2000): all_[k:k + 2000, 32:] = rng.integers(1, 256, all_[k:k + 2000, 32:].shape, dtype=np.uint8)
    copies = n // 100
    all_[n - copies:] = all_[:copies]
    flips = rng.integers(0, 256, (copies, 8)) # up to 8 bits
    for row, f in enumerate(flips): all_[n - copies + row, f // 8] ^= np.uint8(128) >> (f % 8).astype(np.uint8)
    return all_, copies

def search(n, what):
    prints, copies = made(n)
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    found = {"pairs": find_twins, "groups": twin_groups}[what](prints)
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{n:8,} pictures, {what:6} {took:7.2f} s ({cpu:.2f} s of processor time)   found {len(found):,} of {copies:,} planted   peak {peak():.0f} MB, {peak() - before:.0f} MB of it by the search")

def alike(n):
    "The worst case: n copies of one picture, each with a few bits flipped."
    rng, one = np.random.default_rng(1), np.frombuffer(fingerprint(Image.fromarray(draw_phantom({}, patient=1))), np.uint8)
    prints = np.repeat(one[None], n, 0)
    for row in prints: row[rng.integers(0, 32)] ^= np.uint8(1 << int(rng.integers(8)))
    prints[:, 32:] ^= rng.integers(0, 2, (n, 1024), dtype=np.uint8)
    start, cpu = time.perf_counter(), time.process_time()
    groups = twin_groups(prints)
    print(f"{n:8,} copies of one picture, groups {time.perf_counter() - start:7.2f} s ({time.process_time() - cpu:.2f} s of processor time)   found {len(groups)} group of {len(groups[0]):,}   peak {peak():.0f} MB")

if __name__ == "__main__":
    if sys.argv[1:2] in (["pairs"], ["groups"]): search(int(sys.argv[2]), sys.argv[1])
    elif sys.argv[1:2] == ["alike"]: alike(int(sys.argv[2]))
    else:
        for size in (256, 512, 1024, 2048): cost(f"drawn, {size} x {size}", list(drawn(size)))
        if sys.argv[1:]: cost("files of the folder (first 100)", [p.read_bytes() for p in sorted(Path(sys.argv[1]).rglob("*.jpg"))[:100]])
        for what, sizes in ("pairs", (1_000, 10_000, 100_000)), ("groups", (100_000,)), ("alike", (10_000, 100_000)):
            for n in sizes: subprocess.run([sys.executable, __file__, what, str(n)], check=True) # a process of its own, so that the peak is its own
