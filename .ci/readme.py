"""nbs/index.ipynb -> README.md, its pictures -> README_files/ (nbdev_readme does the same, but needs quarto)."""
import base64, posixpath, re, shutil
from pathlib import Path
from execnb.nbio import read_nb

DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
LINK = re.compile(r"(\]\(|src=\")(?!\w+:|#|/)([^)\"]+)") # relative ones point from nbs/, and must point from here

def output(o, number):
    "One output as markdown: a picture, or text indented by four."
    data = o.get("data", {})
    if o.output_type == "stream" and o.name != "stdout": return ""
    if "image/png" in data:
        file = Path("README_files")/f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"![]({file.as_posix()})"
    if "text/markdown" in data: return "".join(data["text/markdown"])
    text = ANSI.sub("", "".join(o.get("text") or data.get("text/plain") or "")).rstrip()
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())

def markdown(nb):
    "The parts of the README, in order."
    for i, cell in enumerate(nb.cells):
        flags = {line[2:].strip().partition(":")[0] for line in cell.source.splitlines() if line.startswith("#|")}
        if cell.cell_type == "raw" or flags & {"hide", "default_exp"}: continue
        if cell.cell_type == "markdown":
            yield LINK.sub(lambda m: m[1] + posixpath.normpath(f"nbs/{m[2]}"), cell.source)
            continue
        code = DIRECTIVE.sub("", cell.source).strip()
        if code and not flags & {"hide_input", "echo"}: yield f"```python\n{code}\n```"
        yield from (output(o, f"{i}-{n}") for n, o in enumerate(cell.get("outputs", [])))

shutil.rmtree("README_files", ignore_errors=True)
head = "<!-- Made from nbs/index.ipynb by `make sync`; edit that. -->"
Path("README.md").write_text("\n\n".join([head, *filter(None, markdown(read_nb("nbs/index.ipynb")))]) + "\n", encoding="utf-8")
