"""Run notebooks in place and keep their outputs: `outputs.py nbs/05_messages.ipynb [slow] [gpu]`.

Cells that are flagged `#| slow` or `#| gpu` keep the outputs they have, unless the flag is named.
A notebook in which a cell fails is left as it was.
"""
import os, subprocess, sys, traceback
from pathlib import Path
os.environ["IN_TEST"] = "1" # what nbdev_test sets
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell

def run(path, skip):
    "Execute the cells of one notebook, from its own folder."
    nb = read_nb(path)
    os.chdir(path.parent)
    shell = CaptureShell(path=path.parent, mpl_format="png")
    for i, cell in enumerate(nb.cells):
        flags = {line[2:].strip() for line in cell.source.splitlines() if line.startswith("#|")}
        if cell.cell_type != "code" or flags & skip: continue
        cell.outputs = shell.run(cell.source)
        if shell.exc: sys.exit(f"{''.join(traceback.format_exception(shell.exc))}\ncell {i} failed, so {path.name} is left as it was:\n{cell.source}")
    write_nb(nb, path)
    subprocess.run([Path(sys.executable).parent/"nbdev_clean", "--fname", path], check=True)
    print(f"{path.name}: {sum(bool(c.get('outputs')) for c in nb.cells)} cells with outputs")

files = [Path(a).resolve() for a in sys.argv[1:] if a.endswith(".ipynb")]
if len(files) != 1: sys.exit('one notebook at a time: make outputs NB=nbs/00_core.ipynb FLAGS="slow gpu"')
run(files[0], {"slow", "gpu", "notest", "eval: false"} - set(sys.argv[1:]))
