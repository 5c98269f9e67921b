"The rules of the house: what every notebook and every module keeps to."
import ast, importlib, inspect, json, pkgutil, re, subprocess, sys, time
from functools import cached_property
from pathlib import Path
import pytest
from fastcore.docments import docments
import medchat
from medchat.cli import COMMANDS, _load

root = Path(__file__).resolve().parent.parent
HEAVY = "torch transformers datasets trl peft unsloth gradio matplotlib bitsandbytes accelerate huggingface_hub".split()
MODULES = [m.name for m in pkgutil.walk_packages(medchat.__path__, "medchat.") if not m.name.rpartition(".")[2].startswith("_")]
COLAB = '''# On Colab only: fetch medchat and its packages. Anywhere else this cell does nothing.
import sys
if "google.colab" in sys.modules:
    get_ipython().system("git clone -q https://github.com/medchat-kit/medchat && pip install -q -e medchat")
    get_ipython().run_line_magic("cd", "medchat/nbs")
    sys.path.insert(0, "..")'''

class Cell:
    "A cell of a notebook: its flags, and its source without them."
    def __init__(self, cell):
        self.kind, self.outputs, lines = cell["cell_type"], cell.get("outputs", []), "".join(cell["source"]).splitlines()
        self.flags = {line[2:].strip().split()[0].rstrip(":") for line in lines if line.startswith("#|")}
        self.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        self.exported = bool(self.flags & {"export", "exports", "exporti"})

    @cached_property
    def tree(self): return ast.parse(self.source)

    @cached_property
    def defines(self): # public names
        return [n.name for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]

    @cached_property
    def length(self): # in lines; a parameter and its comment on a line of their own are not counted, for they are documentation
        functions = [n for n in ast.walk(self.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        return len(self.source.splitlines()) - sum(max(0, n.body[0].lineno - n.lineno - 1) for n in functions)

    @cached_property
    def imports(self): # modules of medchat
        for n in ast.walk(self.tree):
            names = [n.module or "", *(f"{n.module}.{a.name}" for a in n.names)] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names] if isinstance(n, ast.Import) else []
            yield from (name.split(".")[1] for name in names if name.startswith("medchat."))

class Notebook:
    def __init__(self, path):
        self.path, self.raw = path, path.read_text(encoding="utf-8")
        self.cells = [Cell(c) for c in json.loads(self.raw)["cells"]]
        self.code = [c for c in self.cells if c.kind == "code"]

PATHS = sorted(p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

@pytest.fixture(scope="module", params=PATHS, ids=lambda p: p.stem)
def nb(request): return Notebook(request.param)

# ---- notebooks

def test_there_are_notebooks(): assert len(PATHS) >= 15 and (root/"nbs"/"index.ipynb") in PATHS

def test_opens_with_title_subtitle_badge_and_colab_cell(nb):
    opening = nb.cells[0].source
    assert nb.cells[0].kind == "markdown" and re.match(r"# \S.*\n\n> \S.*", opening), "title, empty line, > subtitle"
    if nb.path.stem != "index": assert re.search(r"In: .+ Out: .+", opening, re.S), "what comes in, what goes out"
    where = nb.path.relative_to(root).as_posix()
    badge = f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/medchat-kit/medchat/blob/main/{where})"
    assert badge in "\n".join(c.source for c in nb.cells[:3] if c.kind == "markdown")
    assert [c for c in nb.code[:3] if c.source == COLAB and "hide" in c.flags], "the install cell"

def test_keeps_real_outputs(nb):
    assert sum(bool(c.outputs) for c in nb.code) >= 1
    errors = [o.get("ename") for c in nb.code for o in c.outputs if o["output_type"] == "error"]
    assert not errors

def test_export_cells_are_short(nb):
    long = [(c.length, c.source.splitlines()[0]) for c in nb.code if c.exported and c.length > 30]
    assert not long

def test_every_export_is_shown_working(nb):
    "A public function or class is used within the next two cells that are not themselves exported."
    for i, cell in enumerate(nb.code):
        if not cell.exported: continue
        shown = "\n".join(c.source for c in [c for c in nb.code[i+1:] if not c.exported][:2])
        missing = [name for name in cell.defines if not re.search(rf"\b{name}\b", shown)]
        # one that the others of its cell, or the following exports, are built on is shown by them
        later = "\n".join(c.source for c in nb.code[i:] if c.exported)
        missing = [name for name in missing if len(re.findall(rf"\b{name}\b", later)) < 2]
        assert not missing, f"defined but not shown: {missing}"

def test_more_is_said_than_code_alone(nb):
    exports, prose = [c for c in nb.code if c.exported], [c for c in nb.cells if c.kind == "markdown"]
    assert len(prose) >= len(exports) / 3

def test_no_secrets_and_no_paths_of_a_machine(nb):
    assert not re.findall(r"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}", nb.raw)
    folders = "|".join(["work", "root", "farm", "home/[a-z]+", "Users/[A-Za-z]+", "tmp/[a-z0-9_]{6,}", "content/[a-z]+"])
    assert not re.findall(rf"(?<![\w.:/])/(?:{folders})/[\w./-]*|/tmp/tmp\w+", nb.raw)

def test_imports_only_lower_numbers(nb):
    "A module may look down the list, never up, so that a reader never meets what was not explained."
    order = {m[1]: m[0] for p in (root/"nbs").glob("[0-9]*_*.ipynb") if (m := p.stem.split("_", 1))} # 02 < 02a < 03
    mine = nb.path.stem.partition("_")[0]
    if not mine[:1].isdigit(): pytest.skip("not numbered")
    used = {name for c in nb.code if c.exported for name in c.imports}
    assert not {name for name in used if order.get(name, "") >= mine}

# ---- modules

@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    "module -> the heavy packages that importing it has loaded, in one process of its own."
    code = f"""import importlib, json, sys
found = {{}}
for name in {["medchat", *MODULES]!r}:
    before = set(sys.modules)
    importlib.import_module(name)
    found[name] = [h for h in {HEAVY!r} if h in set(sys.modules) - before]
print(json.dumps(found))"""
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=root, check=True, text=True, capture_output=True).stdout)

def test_importing_loads_nothing_heavy(loaded):
    assert set(loaded) >= {"medchat", "medchat.core", "medchat.train", "medchat.app", "medchat.cli"}
    assert {name: heavy for name, heavy in loaded.items() if heavy} == {}

def test_help_answers_within_half_a_second():
    def seconds():
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", "from medchat.cli import main; main(['--help'])"], cwd=root, check=True, text=True, capture_output=True)
        assert "usage: medchat" in done.stdout
        return time.perf_counter() - start
    assert min(seconds() for _ in range(7)) < 0.5 # the best of several: other work on the machine is not ours

@pytest.mark.parametrize("name", MODULES)
def test_public_things_say_what_they_do_and_take(name):
    "A docstring each, and for each parameter a type; a comment will do where the type's package is imported late, and `model` and `processor` say it themselves."
    module, wrong = importlib.import_module(name), []
    assert module.__doc__, "the subtitle of its notebook"
    for public in module.__all__:
        thing = getattr(module, public)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)): continue
        if not (thing.__doc__ or "").strip() or thing.__doc__.startswith(f"{public}("): wrong.append(f"{public}: no docstring")
        if not inspect.isfunction(thing): continue
        wrong += [f"{public}: {param} has neither type nor comment" for param, about in docments(thing, full=True, returns=False).items()
                  if inspect.signature(thing).parameters[param].annotation is inspect.Parameter.empty and not about.docment
                  and param not in ("model", "processor") and about.kind != inspect.Parameter.VAR_KEYWORD]
    assert not wrong

def test_commands_have_every_type():
    "The command line is made of the types."
    for name in COMMANDS:
        for param in inspect.signature(_load(name)).parameters.values(): assert param.annotation is not param.empty, f"{name}: {param.name}"

def test_only_one_module_imports_unsloth():
    found = [p.name for p in (root/"medchat").rglob("*.py") if re.search(r"^\s*(import|from) unsloth|import_module\(.unsloth|need\(.unsloth", p.read_text(encoding="utf-8"), re.M)]
    assert set(found) <= {"models.py"}

# ---- what is shipped

def size(*folders): return sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())

def test_sample_data_stays_small():
    samples = root/"sample_data"
    assert 0 < size(samples/"phantoms") < 8_000_000
    assert 0 < size(*samples.glob("tiny-*")) <= 8_000_000

def test_the_version_stands_in_one_place():
    assert f"version = {medchat.__version__}\n" in (root/"settings.ini").read_text()
    assert f"## {medchat.__version__}" in (root/"CHANGELOG.md").read_text()

def test_make_targets_that_the_readme_promises():
    said = subprocess.run(["make", "-n", "help", "install", "demo", "test", "sync"], cwd=root, text=True, capture_output=True)
    assert said.returncode == 0, said.stderr
