"Cards, lists, and pushes to a small Hub on this machine by the unmodified client."
import hashlib, json, os, re, socket, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from hub_server import Hub
from run_maker import make_hollow_run, make_run

from medchat.core import MedchatError
from medchat.runs import data_hash
from medchat.publish import card_text, check_repo_id, differing, files_to_push, hub_error, publish, push, read_scores, without_paths, write_card

root = Path(__file__).resolve().parent.parent
ada, bob, wrong = "hf_good_token_of_ada", "hf_read_token_of_bob", "hf_wrong_token_of_eve"

worker_code = """
import contextlib, io, json, os, sys, traceback
from medchat.cli import main
from medchat.core import MedchatError
real = sys.stdout
for line in sys.stdin:
    job = json.loads(line); out, err = io.StringIO(), io.StringIO()
    for k, v in job["env"].items(): os.environ.pop(k, None) if v is None else os.environ.update({k: v})
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if "argv" in job: code = main(job["argv"])
        else:
            try: exec(job["code"], {}); code = 0
            except MedchatError as e: print(e, file=sys.stderr); code = 2
            except Exception: traceback.print_exc(); code = 1
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=real, flush=True)
"""


class Client:
    "A process with the unmodified huggingface_hub and a home of its own; takes one command after the other."
    def __init__(self, env: dict):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))} | {"PYTHONPATH": str(root)} | env
        self.process = subprocess.Popen([sys.executable, "-c", worker_code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.said = []

    def start(self, *argv, code=None, **env):
        job = {"env": env, **({"code": code} if code else {"argv": [str(a) for a in argv]})}
        self.process.stdin.write(json.dumps(job) + "\n"); self.process.stdin.flush()
        return self

    def end(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        code, out, err = json.loads(line)
        self.said += [out, err]
        return code, out, err

    def __call__(self, *argv, **kw): return self.start(*argv, **kw).end()

    def close(self):
        self.process.stdin.close()
        self.said.append(self.process.stderr.read())
        self.process.wait(20)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]

@pytest.fixture(scope="module")
def hub():
    with Hub() as hub: yield hub

@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    c = Client(hub.env(tmp_path_factory.mktemp("home"), ada))
    yield c
    c.close()

@pytest.fixture
def run(tmp_path): return make_hollow_run(tmp_path/"runs"/"chest")

def new_weights(run, content):
    "Other weights for a run; gives the bytes of their file."
    import numpy as np
    from safetensors.numpy import save_file
    file = run/"adapter"/"adapter_model.safetensors"
    save_file({"lora": np.frombuffer(content, np.uint8)}, file)
    return file.read_bytes()

def one_line(err):
    "The error line: the last of stderr, with nothing but progress bars before it."
    *before, last = [l for l in re.split(r"[\r\n]+", err) if l.strip()]
    assert last.startswith("medchat: ") and all(re.search(r"\d+%\||\d+it \[", l) for l in before), err
    return last

# --- slow things that sleep most of the time start first

@pytest.fixture(scope="module", autouse=True)
def broken_line(tmp_path_factory):
    "A push whose uploads are always cut off: the client tries six times, for 23 seconds. Started here, looked at last."
    tmp = tmp_path_factory.mktemp("broken")
    with Hub() as hub:
        hub.faults["drop_lfs"] = 99
        c = Client(hub.env(tmp/"home", ada)).start("push", make_hollow_run(tmp/"chest"), "ada/broken")
        yield hub, c, tmp/"chest"
        c.close()


# --- the card

def test_card_says_only_what_files_say(run):
    text = card_text(run)
    assert "| test | closed accuracy | 0.62 | 0.50 (0.45 to 0.55), n=200 | 0.91 (0.86 to 0.96), n=200 |" in text
    assert "| test | effusion, closed accuracy |  | 0.40 (0.35 to 0.45), n=200 | 0.80 (0.75 to 0.85), n=200 |" in text
    assert "| test | open recall |  | not measured | not measured |" in text
    assert "Draft. Not for clinical use." in text and "Licences: not measured" in text and "Leaks between the splits: not measured" in text
    (run/"eval"/"test.json").unlink()
    assert "## Scores\nNot measured." in card_text(run) and "0.91" not in card_text(run)

def test_card_front_matter_is_yaml_that_the_hub_takes(run):
    import yaml
    meta = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card_text(run), re.S)[1])
    assert meta == dict(base_model="tiny-qwen2-vl", library_name="peft", pipeline_tag="image-text-to-text", license="apache-2.0", language=["en"], tags=meta["tags"])

@pytest.mark.parametrize("base,licence", [("unsloth/Qwen2-VL-2B-Instruct-bnb-4bit", "apache-2.0"), ("Qwen/Qwen2-VL-72B-Instruct", "other"), ("someone/else", "other"), ("tiny-llava-1.6", "apache-2.0"),
    ("unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit", "llama3.2"), ("unsloth/llava-v1.6-mistral-7b-hf-bnb-4bit", "apache-2.0"), ("Qwen/Qwen2.5-VL-3B-Instruct", "other")])
def test_card_licence_of_the_base(tmp_path, base, licence):
    assert f'license: "{licence}"' in card_text(make_hollow_run(tmp_path/"r", base=base))

def test_card_of_a_base_in_a_folder_names_no_folder(tmp_path):
    text = card_text(make_hollow_run(tmp_path/"r", base=str(tmp_path/"private"/"my-base")))
    assert "my-base" in text and str(tmp_path) not in text and "private" not in text

def test_card_reads_the_datasets_report(run):
    data = run.parent/"secret-ward"/"phantoms"
    data.mkdir(parents=True)
    leak = dict(split="test", also_in="train", images=203, of_images=203, groups=0, of_groups=0, rows=451, of_rows=451, examples=["patient-miller.png"])
    report = {"rows": {"in": 3515, "out": 3500, "rejected": 15}, "splits": {"train": {"rows": 3049, "images": 314}}, "licence": {"CC0|1.0": 3, "": 2},
              "source": {"a\nb": 3, "owner/set": 2}, "language": {}, "leaks": [leak]}
    (data/"report.json").write_text(json.dumps(report))
    config = json.loads((run/"config.json").read_text())
    assert "Its report was not found" in card_text(run)                         # it is not the report of the training
    (run/"config.json").write_text(json.dumps(config | {"data_sha256": data_hash(data)}))
    text = card_text(run)
    for words in ("CC0\\|1.0 (3 rows), not stated (2 rows)", "a b (3 rows)", 'datasets: ["owner/set"]', "15 of 3,515 rows", "203 of 203 test images also stand in train (451 of 451 rows)"): assert words in text, words
    assert "miller" not in text and "secret-ward" not in text

def test_own_words_stay_and_figures_are_renewed(run):
    card = write_card(run)
    card.write_text(card.read_text() + "\nMade by ada | spring\n")
    (run/"eval"/"test.json").unlink()
    again = write_card(run).read_text()
    assert again.endswith("\nMade by ada | spring\n") and "0.91" not in again
    assert write_card(run).read_text() == again

def test_broken_evaluation_file(run):
    (run/"eval"/"test.json").write_text("{")
    with pytest.raises(MedchatError, match="broken evaluation file"): card_text(run)

def test_scores_of_a_file_that_holds_few(run):
    s = dict(value=1.0, n=3)
    for content, want in (({"tuned": {"closed_accuracy": s}}, [("closed accuracy", False, True)]), ({"base": {"open_recall": s}, "slices": None, "texts": None}, [("open recall", True, False)]), ({}, []), ([1], [])):
        (run/"eval"/"test.json").write_text(json.dumps(content))
        assert [(r["score"], bool(r["base"]), bool(r["tuned"])) for r in read_scores(run)] == want
        card_text(run)

def test_card_calls_out_a_model_that_does_not_look(run):
    text = card_text(run)
    assert "**Closed accuracy is 0.91 with the right image and 0.90 with a blank image: nothing shows that it looks.**" in text
    assert "| closed accuracy | 0.91 (0.86 to 0.96), n=200 | 0.90 (-2 to 4 points lower) |" in text
    assert "- findings said but not in the reference: 25% (20-30) of 200" in text and "| test | caption, rouge l |" in text and "bleu 2" not in text
    (run/"eval"/"test.json").unlink()
    assert "## Does it look?\nNot measured." in card_text(run)

def test_card_in_a_folder_without_write_access(run, no_write):
    with pytest.raises(MedchatError): write_card(no_write)


# --- the list

def test_what_goes_and_what_stays(run):
    (run/"feedback.jsonl").write_text('{"time": "2026-11-23T10:00:00+00:00", "liked": true}\n') # the thumbs of the chat page
    files = files_to_push(run)
    assert not [name for name in files if "feedback" in name]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "medchat/config.json", "medchat/eval/test.json",
                             "medchat/loss.png", "processor_config.json", "tokenizer.json"]
    sent = b"".join(v if isinstance(v, bytes) else v.read_bytes() for v in files.values())
    for secret in (str(run.parent), "secret-ward", "ward7", "a patient's", "PEFT's own card", "iller", "ward-gpu", "ratings", "liked", "2026-11-23T10"): assert secret.encode() not in sent, secret

def test_a_run_without_its_adapter(run):
    (run/"adapter"/"adapter_model.safetensors").unlink()
    with pytest.raises(MedchatError, match="no finished adapter"): files_to_push(run)

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from(["/srv/ada/x", "~/ada/y z", "C:\\ada\\q", "see /srv/ada/x now", "../ada/k"]),
                           lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=12)

@given(json_values)
def test_no_folder_survives(value):
    clean = json.dumps(without_paths(value))
    for bad in ("/srv/ada", "~/ada", "ada\\\\", "ada/k"): assert bad not in clean
    assert without_paths(json.loads(clean)) == json.loads(clean)

@given(st.text(alphabet="ab1-_./ é\n", max_size=14))
def test_names_that_pass_here_pass_at_the_hub(name):
    from huggingface_hub.utils import validate_repo_id
    try: check_repo_id(name)
    except MedchatError: return
    validate_repo_id(name)
    assert name.count("/") == 1 and name.isascii()

@given(st.text(alphabet="ab1-_.", min_size=1, max_size=8))
def test_names_that_the_hub_takes_pass_here(name):
    from huggingface_hub.utils import validate_repo_id
    if name.endswith(("_", "-", ".")) or name.startswith(("_", "-", ".")): return
    try: validate_repo_id(f"ada/{name}")
    except ValueError: return
    check_repo_id(f"ada/{name}")


# --- dry run

def test_dry_run_needs_no_token_and_no_network(run, tmp_path, medchat):
    env = dict(HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}", HF_HOME=str(tmp_path/"home"), HF_HUB_OFFLINE="1", HF_TOKEN="")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    done = medchat("push", run, "ada/chest", "--dry-run", env=env)
    assert done.returncode == 0, done.stderr
    for path, content in files_to_push(run, "ada/chest").items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        assert re.search(rf"^ +{size:,} bytes  {re.escape(path)}$", done.stdout, re.M), path
    assert "nothing was sent" in done.stdout and "/ada/chest (private)" in done.stdout
    assert re.search(r"Stays here: .*checkpoints/.*eval/test\.jsonl.*log\.jsonl.*receipt\.md", done.stdout)
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")} and not (tmp_path/"home").exists()

def test_only_known_files_go(run):
    before = set(files_to_push(run))
    for name in (".env.json", "credentials.json", "patients.txt", "notes.json", "other.safetensors"): (run/"adapter"/name).write_text("{}")
    assert set(files_to_push(run)) == before

@pytest.mark.parametrize("name", ["adapter/tokenizer.json", "adapter/adapter_model.safetensors", "eval/test.json", "loss.png", "adapter"])
def test_a_link_does_not_go(run, tmp_path, name):
    (run/name).rename(tmp_path/"elsewhere")
    (run/name).symlink_to(tmp_path/"elsewhere")
    with pytest.raises(MedchatError, match="a link is not sent"): files_to_push(run)

@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04K\x01."])
def test_weights_that_are_none_do_not_go(run, content):
    (run/"adapter"/"adapter_model.safetensors").write_bytes(content)
    with pytest.raises(MedchatError, match="weights are damaged"): files_to_push(run)

def test_bad_arguments(run, tmp_path):
    with pytest.raises(MedchatError, match="not a run folder"): push(tmp_path, "ada/chest", dry_run=True)
    with pytest.raises(MedchatError, match="OWNER/NAME"): push(run, "chest", dry_run=True)


# --- push

def test_push_is_private_whole_and_verified(hub, client, run):
    code, out, err = client("push", run, "ada/chest")
    assert code == 0, err
    assert hub.repos["ada/chest"].private and [c[1] for c in hub.repos["ada/chest"].commits] == ["initial commit", "A run of medchat"]
    files = files_to_push(run, "ada/chest")
    assert set(hub.files("ada/chest")) == {*files, ".gitattributes"}
    for path, v in files.items(): assert hub.content("ada/chest", path) == (v if isinstance(v, bytes) else v.read_bytes())
    assert hub.files("ada/chest")["adapter_model.safetensors"].lfs
    assert hub.repos["ada/chest"].commits[-1][0] in out
    assert (run/"card.md").read_bytes() == hub.content("ada/chest", "README.md")
    asked = [(m, p) for m, p, _ in hub.log]
    assert ("GET", f"/api/models/ada/chest/tree/{hub.repos['ada/chest'].commits[-1][0]}?recursive=true&expand=false") in [(m, p.replace("True", "true").replace("False", "false")) for m, p in asked]

def test_push_again_takes_away_what_is_gone(hub, client, run):
    client("push", run, "ada/again")
    (run/"eval"/"test.json").rename(run/"eval"/"by-group.json")
    hub.log.clear()
    code, out, err = client("push", run, "ada/again")
    assert code == 0, err
    assert "medchat/eval/by-group.json" in hub.files("ada/again") and "medchat/eval/test.json" not in hub.files("ada/again")
    assert not [p for m, p, _ in hub.log if m == "PUT"]              # the weights were there already
    code, out, err = client("push", run, "ada/again")                # nothing new
    assert code == 0 and len(hub.repos["ada/again"].commits) == 3

def test_public_only_when_asked(hub, client, run):
    assert client("push", run, "ada/open", "--public")[0] == 0
    assert not hub.repos["ada/open"].private
    commits = len(hub.repos["ada/open"].commits)
    code, out, err = client("push", run, "ada/open")
    assert code == 2 and "this repository is public" in one_line(err) and "--public" in err and len(hub.repos["ada/open"].commits) == commits

def test_to_an_organisation(hub, client, run):
    assert client("push", run, "lab/chest")[0] == 0 and hub.repos["lab/chest"].private

@pytest.mark.parametrize("token,repo,says", [(wrong, "ada/x", "does not accept this token"), (bob, "bob/x", "may not write there"), (ada, "eve/x", "may not write there"),
                                             ("hf_tok en\u00e9", "ada/x", "characters that no token has")])
def test_tokens_that_do_not_fit(hub, client, run, token, repo, says):
    code, out, err = client("push", run, repo, HF_TOKEN=token)
    client("--version", HF_TOKEN=ada)
    assert code == 2 and says in one_line(err) and token not in out + err and repo not in hub.repos

def test_no_token(hub, client, run):
    code, out, err = client("push", run, "ada/x", HF_TOKEN=None)
    client("--version", HF_TOKEN=ada)
    assert code == 2 and "hf auth login" in one_line(err) and "ada/x" not in hub.repos

@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_token_is_not_replaced_by_this_machines_own(run, monkeypatch, empty):
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_machine")
    with pytest.raises(MedchatError, match="no token"): publish(run, "ada/chest", lambda: empty)

def test_the_login_file_works_too(hub, run, tmp_path):
    (tmp_path/"home").mkdir(); (tmp_path/"home"/"token").write_text(ada + "\n")
    c = Client(hub.env(tmp_path/"home"))
    code, out, err = c("push", run, "ada/by-login")
    c.close()
    assert code == 0, err
    assert ada not in "".join(c.said)

def test_a_hub_in_trouble(hub, client, run):
    hub.faults["down"] = 99
    try: code, out, err = client("push", run, "ada/down")
    finally: hub.mend()
    assert code == 2 and "trouble of its own (503)" in err.strip().splitlines()[-1] and "ada/down" not in hub.repos

def test_line_breaks_at_the_commit(hub, client, run):
    hub.faults["drop_commit"] = 1
    code, out, err = client("push", run, "ada/cut")
    assert code == 2 and "line to the Hub broke" in one_line(err)
    assert [c[1] for c in hub.repos["ada/cut"].commits] == ["initial commit"]   # nothing half-written
    assert client("push", run, "ada/cut")[0] == 0 and "adapter_model.safetensors" in hub.files("ada/cut")

def test_one_break_during_an_upload_is_mended(hub, client, run):
    new_weights(run, os.urandom(3_000_000 - 80)) # 80 bytes of header
    hub.faults["drop_lfs"] = 1
    code, out, err = client("push", run, "ada/mended")
    assert code == 0, err
    assert hub.faults["drop_lfs"] == 0 and hub.files("ada/mended")["adapter_model.safetensors"].size == 3_000_000

def test_server_not_there_and_offline_mode(run, tmp_path, medchat):
    env = dict(HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}", HF_HOME=str(tmp_path/"home"), HF_TOKEN=ada, HF_HUB_OFFLINE="0", TRANSFORMERS_OFFLINE="0")
    done = medchat("push", run, "ada/x", env=env)
    assert done.returncode == 2 and "cannot be reached" in one_line(done.stderr)
    done = medchat("push", run, "ada/x", env=env | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "Unset HF_HUB_OFFLINE" in one_line(done.stderr)

def test_a_token_in_a_file_is_not_sent(hub, client, run):
    (run/"adapter"/"chat_template.jinja").write_text(f"token {ada}")
    code, out, err = client("push", run, "ada/leaky")
    assert code == 2 and "holds your token" in one_line(err) and ada not in out + err and "ada/leaky" not in hub.repos

def test_errors_never_quote_the_token():
    class Odd(Exception): pass
    e = Odd(f"Illegal header value b'Bearer {ada}'"); e.__cause__ = ValueError(ada)
    assert ada not in str(hub_error(e, "ada/x", ada)) and "***" in str(hub_error(e, "ada/x", ada))

def test_debug_shows_no_token_either(hub, client, run):
    hub.faults["drop_commit"] = 1
    code, out, err = client("push", run, "ada/debug", "--debug", HF_DEBUG="1")
    assert code == 2 and "Traceback" in err and ada not in out + err

def test_verification_sees_a_difference():
    from types import SimpleNamespace as NS
    data = b"weights"
    good = NS(path="a", blob_id="0", lfs=NS(sha256=hashlib.sha256(data).hexdigest()))
    assert differing({"a": data}, [good]) == [] and differing({"a": data + b"!"}, [good]) == ["a"] and differing({"b": data}, [good, NS(path="b")]) == ["b"]


# --- and back

def test_pulled_run_answers_as_before(hub, client, tmp_path):
    pytest.importorskip("torch")
    from PIL import Image
    from medchat.messages import user_message
    from medchat.models import generate_replies, load_run
    picture = tmp_path/"film.png"
    Image.radial_gradient("L").resize((112, 112)).save(picture)
    question = "What is in the left upper area?"
    ask = lambda run, **options: generate_replies(*load_run(run, **options), [[user_message(question, 1)]], [[picture]], max_new_tokens=40)[0]
    untuned = ask(make_run(tmp_path/"0", seed=0), with_adapter=False)
    run, before = next((run, said) for seed in range(9) if (said := ask(run := make_run(tmp_path/f"real {seed}", seed=seed))) not in ("", untuned)) # its adapter matters, or the test would prove nothing
    code, out, err = client("push", run, "ada/real")
    assert code == 0, err
    from medchat.core import sample_data
    for path in hub.files("ada/real"):                                          # nothing of this machine in what PEFT and transformers wrote
        for here in (tmp_path, root, sample_data(), Path.home()/"x"): assert str(here).removesuffix("x").encode() not in hub.content("ada/real", path), (path, here)
    other = Client(hub.env(tmp_path/"fresh home", ada))
    code, out, err = other(code=f"from medchat.publish import pull; pull('ada/real', {str(tmp_path/'pulled')!r})")
    assert code == 0, err
    assert sorted(p.relative_to(tmp_path/"pulled").as_posix() for p in (tmp_path/"pulled").rglob("*") if p.is_file()) == sorted(
        ["card.md", "config.json", "eval/test.json", "loss.png", *(f"adapter/{p}" for p in files_to_push(run) if "/" not in p and p != "README.md")])
    for name in ("adapter_model.safetensors", "tokenizer.json"): assert (tmp_path/"pulled"/"adapter"/name).read_bytes() == (run/"adapter"/name).read_bytes()
    code, out, err = other("chat", tmp_path/"pulled", "--image", picture, "--question", question, "--max-new-tokens", 40)
    other.close()
    assert code == 0, err
    assert out.splitlines()[0] == before
    assert ada not in "".join(other.said) and not [p for p in tmp_path.rglob("*") if p.is_file() and ada.encode() in p.read_bytes()]

def test_pull_a_revision(hub, client, run, tmp_path):
    client("push", run, "ada/versions")
    first = hub.repos["ada/versions"].commits[-1][0]
    old, new = (run/"adapter"/"adapter_model.safetensors").read_bytes(), new_weights(run, b"new weights")
    client("push", run, "ada/versions")
    for revision, wanted in ((first, old), (None, new)):
        code, out, err = client(code=f"from medchat.publish import pull; pull('ada/versions', {str(tmp_path/str(revision))!r}, revision={revision!r})")
        assert code == 0, err
        assert (tmp_path/str(revision)/"adapter"/"adapter_model.safetensors").read_bytes() == wanted

@pytest.mark.parametrize("repo,says", [("ada/nowhere", "no such repository"), ("ada/empty", "not a run that medchat pushed"), ("ada", "OWNER/NAME")])
def test_pull_what_is_not_there(hub, client, tmp_path, repo, says):
    hub.create(hub.users[ada], "empty", None, "private") if "ada/empty" not in hub.repos else None
    code, out, err = client(code=f"from medchat.publish import pull; pull({repo!r}, {str(tmp_path/'out')!r})")
    assert code == 2 and says in err and list(tmp_path.iterdir()) == []

def test_a_spoiled_download_leaves_nothing(hub, client, run, tmp_path):
    new_weights(run, b"other weights, to be spoiled")
    hub.faults["spoil_lfs"] = 1
    assert client("push", run, "ada/spoiled")[0] == 0
    code, out, err = client(code=f"from medchat.publish import pull; pull('ada/spoiled', {str(tmp_path/'out')!r})")
    assert code == 2 and "differs from what the Hub lists: adapter_model.safetensors" in err and not (tmp_path/"out").exists() and [p.name for p in tmp_path.iterdir()] == ["runs"]

def test_a_stranger_sees_no_private_run(hub, client, run, tmp_path):
    client("push", run, "ada/secret")
    for token in (bob, None):
        code, out, err = client(code=f"from medchat.publish import pull; pull('ada/secret', {str(tmp_path/'out')!r})", HF_TOKEN=token)
        assert code == 2 and not (tmp_path/"out").exists(), err
    client("--version", HF_TOKEN=ada)


# --- last

def test_a_line_that_stays_broken(broken_line):
    hub, c, run = broken_line
    code, out, err = c.end()
    assert code == 2 and "line to the Hub broke" in err.strip().splitlines()[-1] and "Traceback" not in err
    assert [x[1] for x in hub.repos["ada/broken"].commits] == ["initial commit"]
    hub.mend()
    code, out, err = c("push", run, "ada/broken")
    assert code == 0, err
    assert "adapter_model.safetensors" in hub.files("ada/broken")

def test_no_token_was_ever_said(hub, client, tmp_path_factory):
    said = "".join(client.said) + json.dumps(hub.log)
    for token in (ada, bob, wrong): assert token not in said
