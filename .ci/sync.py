"""Notebooks -> clean notebooks, medchat/ and README.md.

`sync.py` does it in place. `sync.py --check` does it in a copy and names every file that differs; it needs no git.
"""
import shutil, subprocess, sys, tempfile
from pathlib import Path

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
MADE = ["nbs", "medchat", "README.md", "README_files"] # what the three steps write
SKIP = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")

def sync(folder):
    "Clean and export the notebooks of `folder`, and write its README."
    for step in [bin/"nbdev_clean"], [bin/"nbdev_export"], [sys.executable, root/".ci"/"readme.py"]:
        subprocess.run(step, cwd=folder, check=True)

def copy(to):
    "Copy what `sync` reads; of what it writes only the notebooks, so that a file no notebook makes shows up."
    for name in "settings.ini", "pyproject.toml", "setup.py": shutil.copy(root/name, to)
    for nb in notebooks(root):
        (to/nb).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/nb, to/nb)

def notebooks(folder): return [p.relative_to(folder) for p in (folder/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]

def made(folder):
    "{relative path: bytes} of all that `sync` writes."
    files = [f for name in MADE[1:] for f in ([folder/name] if (folder/name).is_file() else (folder/name).rglob("*"))]
    files += [folder/nb for nb in notebooks(folder)]
    return {f.relative_to(folder): f.read_bytes() for f in files if f.is_file() and "__pycache__" not in f.parts}

def check():
    with tempfile.TemporaryDirectory() as tmp:
        copy(Path(tmp))
        sync(tmp)
        here, there = made(root), made(Path(tmp))
    wrong = sorted(str(p) for p in there if here.get(p) != there[p])
    extra = sorted(str(p) for p in here.keys() - there.keys())
    if wrong: print("not in sync with the notebooks: " + ", ".join(wrong) + ". Run: make sync", file=sys.stderr)
    if extra: print("made by no notebook: " + ", ".join(extra) + ". Remove it, or write its notebook", file=sys.stderr)
    if wrong or extra: sys.exit(1)
    print(f"in sync: {len(here)} files")

check() if sys.argv[1:] == ["--check"] else sync(root)
