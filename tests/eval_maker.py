"Runs with evaluations for tests, few of their parts real: a folder as the dashboard finds it."
import json
from pathlib import Path
from PIL import Image

from medchat.core import Record, Turn, write_jsonl
from medchat.curate import convert
from medchat.runs import data_hash

evil = '<script>document.title = "owned"</script><img src=x onerror="document.title=1"> **bold** $x$ [a](http://evil.example)'


def score(value, n=20): return dict(value=value, n=n, groups=n, low=max(0., value - .1), high=min(1., value + .1), unparsed=0)

def make_answers(tuned_scores, said=None):
    "An answer for each score; the first is about the picture p0."
    return [dict(id=f"q{i}-0", images=[f"p{i}.png"], kind="vqa", answer_type="closed", types=["side" if i % 2 else "presence"], slices=dict(modality="CT" if i < 3 else "MRI", language="en"), group=f"g{i}", question=f"Is there a lesion {i}?", prompt="…", reference="yes",
        score="closed_accuracy", base="no", tuned=said if said and not i else "yes" if s else "no", base_score=0., tuned_score=float(s), base_read=True, tuned_read=i != 5, base_confidence=.5, tuned_confidence=.9, ablated=dict(blank=dict(reply="blind reply", score=0., read=True)) if not i else {})
        for i, s in enumerate(tuned_scores)]

def make_eval(run, sha="a"*64, name="test", tuned=(1, 0, 1, 1, 0, 1), answers=None, **more):
    "An evaluation in a run folder, with few of its parts real."
    share = sum(tuned)/len(tuned)
    result = dict(run=run.name, split="test", data="scans", data_sha256=sha, limit=None, benchmark=None, base=dict(closed_accuracy=score(.2)), tuned=dict(closed_accuracy=score(share, len(tuned))), difference=dict(closed_accuracy=dict(value=share - .2, low=.1, high=.5, p=.012, n=6, groups=6)),
        slices=[dict(by="type", name=t, base=dict(closed_accuracy=score(.2)), tuned=dict(closed_accuracy=score(share))) for t in ("presence", "side")] + [dict(by="modality", name=m, base={}, tuned=dict(closed_accuracy=score(share))) for m in ("CT", "MRI")],
        looks=dict(blank=dict(closed_accuracy=dict(value=.5, drop=dict(value=.25)))), calibration=dict(base=None, tuned=dict(ece=.125)), warnings=["it is blind"], leaks=[], notes=[]) | more
    (run/"eval").mkdir(parents=True, exist_ok=True)
    (run/"eval"/f"{name}.json").write_text(json.dumps(result))
    write_jsonl(run/"eval"/f"{name}.jsonl", answers if answers is not None else make_answers(tuned))
    return result

def make_bare_run(folder, losses=(3., 2., 1.5), **config):
    "A run folder without a model."
    folder.mkdir(parents=True)
    (folder/"config.json").write_text(json.dumps(dict(medchat="0.1.0", base="tiny-qwen2-vl", data="scans") | config))
    (folder/"log.jsonl").write_text("".join(json.dumps(dict(step=i + 1, loss=v)) + "\n" for i, v in enumerate(losses)) + json.dumps(dict(step=len(losses), eval_loss=losses[-1] + .1)) + "\n")
    return folder

def make_runs(home: Path) -> Path:
    "Two runs on the same data, which is there; one on other data, in a group; one damaged, one not evaluated; and folders that are no runs."
    (home/"src").mkdir()
    for i in range(6): Image.new("RGB", (64 + i, 64), (40*i, 0, 0)).save(home/"src"/f"p{i}.png")
    write_jsonl(home/"src"/"records.jsonl", (Record(f"q{i}-0", [f"p{i}.png"], [Turn("user", f"Is there a lesion {i}?"), Turn("assistant", "yes")], "vqa", split="test", group=f"g{i}").to_dict() for i in range(6)))
    data = convert(home/"src", home/"scans", keep_splits=True)
    sha, runs = data_hash(data), home/"runs"
    make_eval(make_bare_run(runs/"first", data=str(data)), sha, answers=make_answers((1, 0, 1, 1, 0, 1), evil))
    make_eval(make_bare_run(runs/"second", (4., 3., 2.), data=str(data)), sha, tuned=(1, 1, 1, 1, 1, 0))
    make_eval(make_bare_run(runs/"group"/"<b>third", data="gone"), "b"*64, tuned=(1,)*6)
    make_bare_run(runs/"young", (5.,))
    (runs/"cut").mkdir(); (runs/"cut"/"config.json").write_text('{"base": "tiny')
    (runs/"notes").mkdir(); (runs/"notes"/"a.txt").write_text("no run")
    (runs/"base model").mkdir(); (runs/"base model"/"config.json").write_text('{"model_type": "qwen2_vl"}')
    (runs/".hidden").mkdir(); (runs/".hidden"/"log.jsonl").write_text("{}\n")
    (runs/"file").write_text("")
    return runs

def by_name(runs): return {r.name: r for r in runs}
