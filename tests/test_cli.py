"Edge cases of 21_cli: options from signatures, exit codes, one-line errors, pipes, Ctrl-C."
import os, signal, subprocess, sys
from pathlib import Path
from typing import Iterable, Literal, Optional, Sequence, Union
import pytest
import medchat as package
from medchat import cli
from medchat.cli import COMMANDS, main, make_parser
from medchat.core import MedchatError

root = Path(cli.__file__).parent.parent

def parse(func, words, **kw): return vars(make_parser(func, "x", **kw).parse_args(words.split()))

# ---- from signatures to options

@pytest.mark.parametrize("annotation, words, value", [
    (str, "a", "a"), (int, "-3", -3), (float, "1e-4", 1e-4), (Path, "a/b", Path("a/b")), (str | None, "a", "a"), (Optional[int], "7", 7), (str | Path, "a/", "a/"),
    (Union[Path, None], "a", Path("a")), (int | float, ".5", .5), (list[str], "a b", ["a", "b"]), (list[int] | None, "1 2", [1, 2]), (str | list[str], "a", ["a"]),
    (tuple[str, ...], "a b", ["a", "b"]), (Sequence[float], "1 2", [1., 2.]), (Iterable[Path], "a", [Path("a")]), (Literal["a", "b"], "b", "b"), (Literal["a"] | None, "a", "a"), (Literal[4, 8], "8", 8)])
@pytest.mark.parametrize("place", [True, False])
def test_types(annotation, words, value, place):
    def f(thing): "Do."
    f.__annotations__ = {"thing": annotation}
    if place: assert parse(f, words, by_place=["thing"]) == {"thing": value}
    else: assert parse(f, f"--thing {words}") == {"thing": value}

def switches(a_b: bool = False, c_d: bool = True, e: bool | None = None): "Do."

@pytest.mark.parametrize("words, change", [("", {}), ("--a-b", {"a_b": True}), ("--no-c-d", {"c_d": False}), ("--c-d", {"c_d": True}), ("--no-e", {"e": False}), ("--e", {"e": True})])
def test_switches(words, change): assert parse(switches, words) == {"a_b": False, "c_d": True, "e": None, **change}

def test_what_a_command_line_cannot_give_is_left_out():
    def f(a: str, model: "SomethingElse" = None, hook: callable = None, _private: int = 3, *rest, **more): "Do."
    assert parse(f, "--a x") == {"a": "x"}
    def g(model: dict): "Do."
    with pytest.raises(TypeError, match="model"): make_parser(g, "x")

def test_keyword_only_and_missing():
    def f(data: str, *, run: str, max_steps: int | None = None): "Do."
    assert parse(f, "--data d --run r --max-steps 3") == {"data": "d", "run": "r", "max_steps": 3}
    with pytest.raises(MedchatError, match="--run. See: medchat x --help"): parse(f, "--data d")

def test_help_text(capsys):
    def f(
        runs: list[str],      # run folders
        share: float = .5,    # 50% of it
        out: str | None = None, # where to
        rate: float = 2e-4,   # of learning
        name: str = "",       # of it
    ):
        "Do a thing. 100% sure."
    make_parser(f, "thing", by_place=["runs"], example="medchat thing a b").print_help()
    said = capsys.readouterr().out
    for part in "usage: medchat thing", "RUN [RUN ...]", "run folders", "50% of it (default: 0.5)", "(default: 0.0002)", "Do a thing. 100% sure.", "example:\n  medchat thing a b": assert part in said
    assert "default: None" not in said and "default: )" not in said

def test_options_are_not_guessed_from_their_beginning():
    with pytest.raises(MedchatError, match="unrecognized arguments: --a"): parse(switches, "--a")

# ---- main

@pytest.fixture
def command(monkeypatch):
    "Make a function the command `act`."
    def make(func):
        monkeypatch.setitem(COMMANDS, "act", "act:act")
        monkeypatch.setattr(cli, "_load", lambda name: func)
    return make

def fails(e):
    def act(times: int = 1): raise e
    return act

@pytest.mark.parametrize("error, code, says", [
    (MedchatError("no such thing", "x", "Make one"), 2, "medchat: no such thing: x. Make one"),
    (PermissionError(13, "Permission denied", "/a/b"), 2, "medchat: Permission denied: /a/b."),
    (OSError(28, "No space left on device", "big"), 2, "medchat: No space left on device: big."),
    (ModuleNotFoundError("No module named 'trl'", name="trl"), 2, "medchat: a package is missing: trl."),
    (ModuleNotFoundError("No module named 'medchat.x'", name="medchat.x"), 1, "medchat: medchat hit a bug: ModuleNotFoundError"),
    (KeyError("lost\nline"), 1, "medchat: medchat hit a bug: KeyError"), (OSError("odd"), 1, "medchat: medchat hit a bug: OSError: odd."), (OSError(5, "Input/output error"), 1, "medchat: medchat hit a bug: OSError"), (AssertionError(), 1, "medchat: medchat hit a bug: AssertionError"),
    (ConnectionError("x"), 1, "medchat: medchat hit a bug: ConnectionError"), (MemoryError(), 1, "medchat: medchat hit a bug: MemoryError"),
    (KeyboardInterrupt(), 130, "medchat: stopped. Start it again with: medchat act --times 3")])
def test_every_trouble_is_one_line_and_a_code(command, capsys, error, code, says):
    command(fails(error))
    assert main(["act", "--times", "3"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(says) and len(err.splitlines()) == 1

def test_debug_shows_where(command, capsys):
    command(fails(MedchatError("no such thing")))
    for words in ["act", "--debug"], ["--debug", "act"]:
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err and "test_cli.py" in err and err.splitlines()[-1] == "medchat: no such thing"

def test_the_stopped_are_told_how_to_resume(command, capsys):
    def act(run: str, resume: bool = False): raise KeyboardInterrupt
    command(act)
    main(["act", "--run", "my run"])
    assert capsys.readouterr().err.strip() == "medchat: stopped. Go on with: medchat act --run 'my run' --resume"
    main(["act", "--run", "r", "--resume"])
    assert capsys.readouterr().err.strip() == "medchat: stopped. Start it again with: medchat act --run r --resume"

@pytest.mark.parametrize("result, said", [(None, ""), ("text", "text\n"), (Path("x"), ""), ({"a": 1}, ""), (0, ""), (7, "")])
def test_only_text_is_printed_and_no_result_is_a_code(command, capsys, result, said):
    def act(): return result
    command(act)
    assert main(["act"]) == 0 and capsys.readouterr().out == said

@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_overview_lists_every_command_on_one_line(capsys, words):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS: assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert not [line for line in lines if len(line) > 120]

def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"medchat {package.__version__}\n"

def test_unknown_command_names_the_known(capsys):
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("medchat: unknown command: trian.") and all(name in err for name in COMMANDS)

# ---- the real commands

@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_has_help_and_a_working_example(capsys, name):
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: medchat {name}" in said and cli.EXAMPLES[name] in said
    import shlex
    command, *words = shlex.split(cli.EXAMPLES[name])[1:]
    assert command == name
    make_parser(cli._load(name), name, cli.BY_PLACE.get(name, ())).parse_args(words)
    assert cli._summary(COMMANDS[name]) in said

@pytest.mark.parametrize("words", [
    "samples --out DIR --seed 3", "convert SOURCE --format records --out DIR", "train --data DIR --base tiny-qwen2-vl --run RUN --max-steps 5 --resume", "plot RUN", "plot RUN RUN2 --out FILE",
    "evaluate RUN --data DIR --split test", "evaluate RUN RUN2 --data DIR", "chat RUN --image FILE --question TEXT", "app RUN --port 7861", "push RUN REPO_ID --dry-run", "doctor"])
def test_the_promised_command_lines_parse(words):
    name, *rest = words.split()
    make_parser(cli._load(name), name, cli.BY_PLACE.get(name, ())).parse_args(rest)

@pytest.mark.parametrize("words", [
    "convert nowhere --format records --out out", "convert . --format nowhere --out out", "train --data nowhere --run out", "train --data . --run out --base nowhere/at-all", "plot nowhere", "evaluate nowhere --data nowhere",
    "chat nowhere --image x.png --question q", "app nowhere", "push nowhere a/b --dry-run", "samples", "train --data d --run r --max-steps many", "plot", "fly"])
def test_wrong_input_is_one_line_and_leaves_nothing(medchat, tmp_path, words):
    done = medchat(*words.split())
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("medchat: ") and done.stdout == ""
    assert list(tmp_path.iterdir()) == []

# ---- as a process

def test_console_script(tmp_path):
    script = Path(sys.executable).with_name("medchat")
    done = subprocess.run([script, "--version"], cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"medchat {package.__version__}\n")
    assert subprocess.run([script, "fly"], cwd=tmp_path, capture_output=True).returncode == 2

@pytest.fixture
def act(tmp_path):
    "Start a process in which the function `act` is a command."
    def start(source):
        (tmp_path/"act.py").write_text(f"import sys, time\nimport medchat.cli as cli\n{source}\ncli.COMMANDS['act'], cli._load = 'act:act', lambda name: act\nsys.exit(cli.main(['act']))")
        return subprocess.Popen([sys.executable, "act.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start

def test_a_reader_that_goes_away_is_no_error(act):
    p = act("def act():\n  for i in range(200_000): print('a line of output')")
    assert p.stdout.readline() == "a line of output\n"
    p.stdout.close()
    assert p.wait(timeout=20) == 141 and p.stderr.read() == ""

def test_ctrl_c(act):
    p = act("def act(resume: bool = False):\n  print('ready', flush=True); time.sleep(60)")
    assert p.stdout.readline() == "ready\n"
    p.send_signal(signal.SIGINT)
    assert p.wait(timeout=20) == 130
    assert p.stderr.read().splitlines() == ["medchat: stopped. Go on with: medchat act --resume"]
