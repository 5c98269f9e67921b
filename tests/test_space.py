"The folder of a Space: what is in it, what is not, and that its program finds what it needs."
import inspect, json, os, re, runpy, socket, subprocess, sys, time
from pathlib import Path
import pytest
from browser_tab import BrowserTab
from hub_server import Hub
from openid_server import OpenID
from run_maker import make_hollow_run, make_run

import medchat as package
import medchat.app
from medchat.core import DISCLAIMER, MedchatError
from medchat.space import app_text, readme_text, requirements_text, space, space_files, space_metadata, suggest_hardware

root = Path(__file__).resolve().parent.parent
secrets = ("secret-ward", "ward7", "a patient's", "PEFT's own card", "iller", "ward-gpu", "ratings", "liked", "optimizer", "phantom-9", "correction")
token = "hf_good_token_of_ada"

@pytest.fixture
def run(tmp_path): return make_hollow_run(tmp_path/"runs"/"chest")

@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    "No token and no home of somebody who runs the tests."
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path/"no-token"))

def content(v): return v if isinstance(v, bytes) else v.read_bytes()
def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
def head_of(text):
    import yaml
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])

# --- what goes, and what stays

def test_what_goes_and_what_stays(run, tmp_path):
    (run/"feedback.jsonl").write_text('{"time": "2026-11-23T10:00:00+00:00", "liked": true}\n')
    (run/"feedback"/"images").mkdir(parents=True)
    (run/"feedback"/"records.jsonl").write_text('{"correction": "phantom-9"}\n'); (run/"feedback"/"images"/"a.png").write_bytes(b"x")
    (run/"audit.sqlite").write_bytes(b"a patient's words")
    files = names(space(run, tmp_path/"out"))
    assert [f for f in files if not f.startswith("sample_data/")] == ["README.md", "app.py", "requirements.txt", "run/adapter/adapter_config.json", "run/adapter/adapter_model.safetensors",
        "run/adapter/chat_template.jinja", "run/adapter/processor_config.json", "run/adapter/tokenizer.json", "run/config.json"]
    assert {f.split("/")[1] for f in files if f.startswith("sample_data/")} == {"phantoms", "tiny-qwen2-vl"}
    sent = b"".join((tmp_path/"out"/f).read_bytes() for f in files)
    for secret in (*secrets, str(run.parent), str(tmp_path), str(root), "2026-11-23T10"): assert secret.encode() not in sent, secret
    config = json.loads((tmp_path/"out"/"run"/"config.json").read_text())
    assert not {"data", "data_sha256", "run", "user", "host", "resume"} & set(config) and config["base"] == "tiny-qwen2-vl" and config["base_sha256"] == "0" * 64

def test_the_run_stays_as_it_was(run, tmp_path):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    space(run, tmp_path/"out")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

def test_a_base_from_the_hub_is_named_and_not_copied(tmp_path):
    base = "unsloth/Qwen2-VL-2B-Instruct-bnb-4bit"
    run = make_hollow_run(tmp_path/"r", base=base)
    files = space_files(run)
    assert not [f for f in files if f.startswith("sample_data/") and "phantoms" not in f]
    about = head_of(readme_text(run))
    assert about["models"] == [base] and about["suggested_hardware"] == "t4-small" and about["license"] == "apache-2.0" and json.loads(files["run/config.json"])["base"] == base

@pytest.mark.parametrize("base", ["/srv/ada/my-base", "my-base", "../bases/my-base", "C:\\ada\\my-base"])
def test_a_base_that_no_space_can_fetch_is_refused_now(tmp_path, base):
    with pytest.raises(MedchatError, match="the base is not on the Hub") as e: space(make_hollow_run(tmp_path/"r", base=base), tmp_path/"out")
    assert "/srv/ada" not in str(e.value) and not (tmp_path/"out").exists()

def test_a_folder_with_the_form_of_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); Path("bases/mine").mkdir(parents=True)
    with pytest.raises(MedchatError, match="the base is not on the Hub"): space_files(make_hollow_run(tmp_path/"r", base="bases/mine"))

def test_links_are_not_followed(run, tmp_path):
    (tmp_path/"secret").write_text("{}")
    (run/"adapter"/"tokenizer.json").unlink(); (run/"adapter"/"tokenizer.json").symlink_to(tmp_path/"secret")
    with pytest.raises(MedchatError, match="a link"): space(run, tmp_path/"out")
    assert not (tmp_path/"out").exists()

def test_a_token_in_a_file_is_found(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    (run/"adapter"/"chat_template.jinja").write_text(f"{{# {token} #}}")
    with pytest.raises(MedchatError, match="holds your token: run/adapter/chat_template.jinja") as e: space(run, tmp_path/"out")
    assert token not in str(e.value) and not (tmp_path/"out").exists()

def test_a_token_elsewhere_does_not_come_along(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    assert all(token.encode() not in (tmp_path/"out"/f).read_bytes() for f in names(space(run, tmp_path/"out")))

# --- errors

def test_an_unfinished_run_a_wrong_one_and_a_folder_that_is_there(run, tmp_path, no_write):
    for folder in (tmp_path, tmp_path/"nowhere"):
        with pytest.raises(MedchatError, match="not a run folder"): space(folder, tmp_path/"out")
    with pytest.raises(MedchatError, match="the folder is there already"): space(run, tmp_path)
    with pytest.raises(MedchatError, match="cannot write"): space(run, no_write/"out")
    (run/"adapter"/"adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(MedchatError, match="damaged"): space(run, tmp_path/"out")
    (run/"adapter"/"adapter_model.safetensors").unlink()
    with pytest.raises(MedchatError, match="no finished adapter"): space(run, tmp_path/"out")
    assert not (tmp_path/"out").exists() and not list(tmp_path.glob(".*tmp"))

def test_without_samples_a_base_of_the_hub_still_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCHAT_SAMPLE_DATA", str(tmp_path/"none"))
    assert not [f for f in space_files(make_hollow_run(tmp_path/"r", base="owner/base")) if f.startswith("sample_data")]

# --- the head of the README

def test_the_hub_understands_the_head(run):
    from huggingface_hub import SpaceCard, SpaceHardware
    import gradio
    text = readme_text(run)
    card = SpaceCard(text).data
    about = card.to_dict()
    assert about == head_of(text) == space_metadata(run)
    assert (card.sdk, card.sdk_version, card.app_file, about["pinned"]) == ("gradio", gradio.__version__, "app.py", False)
    colours = "red yellow green blue indigo purple pink gray".split()                # as the reference lists them
    assert about["colorFrom"] in colours and about["colorTo"] in colours and not about["emoji"].isascii() and len(about["short_description"]) <= 60
    assert SpaceHardware(about["suggested_hardware"]) and re.fullmatch(r"3\.\d+", about["python_version"])
    assert about["hf_oauth"] is True and about["hf_oauth_scopes"] == ["contribute-repos"] # a visitor publishes as himself, and lends no other repository of his
    known = set(inspect.signature(type(card).__init__).parameters) | {"hf_oauth", "hf_oauth_scopes", "emoji", "colorFrom", "colorTo", "pinned", "short_description", "suggested_hardware"}
    assert set(about) <= known

def test_python_3_10_is_not_python_3_1(run, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert head_of(readme_text(run))["python_version"] == "3.10"

@pytest.mark.parametrize("name", ['a "b": c', "line\nbreak", "தமிழ்", "x" * 200, "--- # 'q'"])
def test_any_name_of_a_run_makes_a_head(tmp_path, name):
    head = head_of(readme_text(make_hollow_run(tmp_path/name)))
    assert head["title"].startswith(name[:60]) and head["sdk"] == "gradio"

def test_the_disclaimer_stands_in_the_readme_and_in_the_program(run): assert DISCLAIMER in readme_text(run) and DISCLAIMER in app_text()

@pytest.mark.parametrize("base,in_4bit,hardware", [("tiny-llava-1.6", True, "cpu-basic"), ("unsloth/llava-v1.6-mistral-7b-hf-bnb-4bit", True, "t4-small"), ("Qwen/Qwen2.5-VL-3B-Instruct", False, "t4-small"),
    ("meta-llama/Llama-3.2-11B-Vision-Instruct", False, "l40sx1"), ("Qwen/Qwen2-VL-72B-Instruct", False, "a100-large"), ("someone/else", True, "t4-small"), ("someone/x-4bit", True, "t4-small")])
def test_hardware(base, in_4bit, hardware): assert suggest_hardware(base, in_4bit) == hardware

# --- the program

def test_medchat_is_pinned():
    from packaging.requirements import Requirement
    line, = requirements_text().splitlines()
    pin = Requirement(line)
    assert pin.name == "medchat" and re.fullmatch(r"git\+https://github\.com/medchat-kit/medchat@([0-9a-f]{40}|v\d+(\.\d+)+)", pin.url)
    assert f"git_url = {pin.url.removeprefix('git+').partition('@')[0]}\n" in (root/"settings.ini").read_text()

@pytest.mark.parametrize("said,pin", [('{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "%s"}}' % ("a" * 40), "a" * 40), ("{}", "v" + package.__version__), ("{broken", "v" + package.__version__), (None, "v" + package.__version__)])
def test_the_pin_of_an_installed_medchat(monkeypatch, tmp_path, said, pin):
    from importlib import metadata
    from types import SimpleNamespace
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: said))
    monkeypatch.setattr(package, "__file__", str(tmp_path/"medchat"/"__init__.py"))  # not in a clone
    assert requirements_text().strip().endswith(f"@{pin}")

def test_the_program_opens_the_page_of_its_run(run, tmp_path, monkeypatch):
    "With a stand-in for the page: what it is asked for."
    asked = []
    class Page:
        def launch(self, **k): asked.append(k)
    monkeypatch.setattr(medchat.app, "make_app", lambda *runs, **k: (asked.append((runs, k)), Page())[1], raising=False)
    monkeypatch.delenv("MEDCHAT_SAMPLE_DATA", raising=False)
    out = space(run, tmp_path/"out")
    runpy.run_path(str(out/"app.py"), run_name="__main__")
    seen = os.environ.pop("MEDCHAT_SAMPLE_DATA")
    assert asked == [((str(out.resolve()/"run"),), dict(local=False, hub=False)), dict(server_name="0.0.0.0", server_port=7860)] and seen == str(out.resolve()/"sample_data")

def test_there_is_such_a_page(): inspect.signature(medchat.app.make_app).bind("run", local=False)

alone = """
import json, os, runpy
runpy.run_path("app.py")                                    # its imports and its settings, without the page
from medchat.core import read_jsonl
from medchat.images import load_image
from medchat.messages import user_message
from medchat.models import generate_replies, load_run
model, processor = load_run("run")
home = os.environ["MEDCHAT_SAMPLE_DATA"] + "/phantoms/"
rows = [row for _, row in read_jsonl(home + "records.jsonl") if row["split"] == "test" and row["kind"] == "caption"] # as the page looks for its examples
images = sorted(home + row["images"][0] for row in rows)
reply = generate_replies(model, processor, [[user_message("Is the heart enlarged?", 1)]], [[load_image(images[0])]])
print(json.dumps([os.environ["MEDCHAT_SAMPLE_DATA"], images, reply]))
"""

def test_the_run_answers_from_the_folder_alone(tmp_path):
    "In another process, with nothing but the folder: the base, the adapter and the examples are in it."
    from medchat.images import load_image
    from medchat.messages import user_message
    from medchat.models import generate_replies, load_run
    run = make_run(tmp_path/"run")
    out = space(run, tmp_path/"a space")
    env = {k: v for k, v in os.environ.items() if k != "MEDCHAT_SAMPLE_DATA"} | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", alone], cwd=out, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    home, images, reply = json.loads(done.stdout.splitlines()[-1])
    assert home == str(out.resolve()/"sample_data") and len(images) == 4 and all(i.startswith(home) for i in images)
    assert reply == generate_replies(*load_run(run), [[user_message("Is the heart enlarged?", 1)]], [[load_image(images[0])]])

# --- who signs in

def test_nobody_publishes_for_visitors_who_cannot_sign_in(run, monkeypatch):
    for name in ("SYSTEM", "OAUTH_CLIENT_ID"): monkeypatch.delenv(name, raising=False)
    from medchat.app import build_page
    from medchat.session import Desk
    from scripted import Scripted
    for name in (None, "OAUTH_CLIENT_ID", "SYSTEM"): # outside a Space Gradio would hand every visitor the token of this machine
        if name: monkeypatch.setenv(name, "spaces")
        if name == "SYSTEM": monkeypatch.delenv("OAUTH_CLIENT_ID")
        with pytest.raises(MedchatError, match="visitors cannot sign in here"): build_page(Desk([Scripted()]), runs=dict(chest=run), local=False)

program = """
import sys
from medchat.app import build_page
from medchat.session import Desk
from pathlib import Path
sys.path.insert(0, "tests")
from scripted import Scripted
build_page(Desk([Scripted()]), runs=dict(chest=Path(sys.argv[1])), fetched="fetched", local=False).launch(server_port=int(sys.argv[2]))
"""

def test_a_visitor_publishes_as_himself(run, browser, tmp_path):
    "The page of a Space, with a sign-in by OpenID: the owner's token lies in the environment, and is not used."
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with Hub({token: dict(name="ada", role="write", orgs=[]), "hf_token_of_the_visitor": dict(name="eve", role="write", orgs=[])}) as hub, OpenID("eve", "hf_token_of_the_visitor") as openid:
        env = os.environ | hub.env(tmp_path, token=token) | openid.env("contribute-repos") | dict(SYSTEM="spaces", SPACE_ID="ada/chest", PYTHONPATH=str(root))
        with subprocess.Popen([sys.executable, "-c", program, str(run), str(port)], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as space:
            try:
                for _ in range(600):
                    with socket.socket() as s:
                        if not s.connect_ex(("127.0.0.1", port)) or space.poll() is not None: break
                    time.sleep(.2)
                with BrowserTab(browser, f"http://127.0.0.1:{port}", "#question textarea", 1280, 900) as tab:
                    page, refused = tab.page, []
                    page.on("requestfailed", lambda r: r.failure == "csp" and refused.append(r.url)) # what Gradio's header of a Space would fetch
                    def try_to(name, repo):
                        page.get_by_role("tab", name="Hub").click()
                        page.fill("#repo textarea", repo); page.click(f"#{name}")
                    try_to("push", "eve/chest"); page.get_by_text("You are not signed in").wait_for()
                    try_to("dry", "eve/chest"); page.wait_for_function("() => document.querySelector('#pushed textarea').value.includes('nothing was sent')")
                    assert hub.repos == {} and page.locator("#adapter:visible").count() == 0
                    page.click("#login"); page.wait_for_event("load"); page.get_by_role("tab", name="Hub").click(); page.wait_for_selector("#login:has-text('eve')", state="attached")
                    assert openid.seen == ["openid profile contribute-repos"]
                    try_to("push", "ada/chest"); page.get_by_text("hf auth").or_(page.get_by_text("not allowed")).or_(page.get_by_text("rights")).first.wait_for()
                    assert "ada/chest" not in hub.repos
                    try_to("push", "eve/chest"); page.wait_for_function("() => document.querySelector('#pushed textarea').value.includes('Pushed and verified')")
                    assert list(hub.repos) == ["eve/chest"] and hub.repos["eve/chest"].private and "hf_token" not in page.content() and token not in page.content()
                    tab.requests = [u for u in tab.requests if u not in refused]
            finally: space.terminate(); said = space.communicate(timeout=30)[0]
    assert "hf_token" not in said and token not in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before # another's push writes no card here
