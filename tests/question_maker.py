"A small data set, questions by hand, and a model that says what a function says: for the tests of answers, scores, probes and evaluations."
from contextlib import contextmanager
from pathlib import Path
import pytest
from PIL import Image
from medchat.answers import Question, read_questions
from medchat.core import write_jsonl
from medchat.curate import convert, read_dataset

FACTS = [("Is the heart enlarged?", "yes", "closed", ["heart"]), ("Is there fluid?", "no", None, ["fluid", "lung"]), ("Which side?", "Left", "closed", []),
         ("What is seen?", "pleural effusion", "open", "finding")]
KNOWN = {q: a for q, a, *_ in FACTS} | {"Describe it.": "a heart", "Then?": "later"} # what the tuned fake says

def make_rows(n_patients=6, extra=()):
    "Questions, a caption and a conversation about each of some patients; every second one is held out."
    for p in range(n_patients):
        common = dict(images=[f"images/p{p}.png"], split="test" if p % 2 else "train", group=f"patient {p}", source="made up", licence="CC0-1.0")
        for k, (q, a, kind, types) in enumerate(FACTS):
            if q == "Is the heart enlarged?" and p == 5: a = "no"
            yield dict(id=f"p{p}-{k}", turns=[dict(role="user", text=q), dict(role="assistant", text=a)], kind="vqa", answer_type=kind, meta=dict(question_type=types), **common)
        yield dict(id=f"p{p}-c", turns=[dict(role="user", text="Describe it."), dict(role="assistant", text="A large heart.")], kind="caption", **common)
        yield dict(id=f"p{p}-t", turns=[dict(role=r, text=t) for r, t in (("user", "First?"), ("assistant", "Earlier."), ("user", "Then?"), ("assistant", "Later."))],
                   kind="conversation", **common)
    yield from extra

def make_data(folder: Path, rows) -> Path:
    "A dataset folder; image p has 40 + p pixels across."
    (folder/"images").mkdir(parents=True)
    for p in range(8): Image.new("L", (40 + p, 48), 20*p).save(folder/"images"/f"p{p}.png")
    write_jsonl(folder/"records.jsonl", rows)
    return convert(folder, folder/"out", keep_splits=True)

@pytest.fixture(scope="module")
def data(tmp_path_factory): return make_data(tmp_path_factory.mktemp("data"), make_rows())

@pytest.fixture(scope="module")
def dataset(data): return read_dataset(data, "test")

@pytest.fixture(scope="module")
def questions(dataset): return read_questions(dataset)

def question(i, kind="vqa", answer_type="closed", group="g", images=1, text="Q?", reference="yes", types=(), paths=None, **slices) -> Question:
    "A question that no data set has."
    paths = [f"x{k}.png" for k in range(images)] if paths is None else list(paths)
    prompt = [dict(role="user", content=[dict(type="image")]*len(paths) + [dict(type="text", text=text)])]
    return Question(i, f"q{i}", kind, answer_type, text, reference, prompt, group, paths, list(types), slices)

class Fake:
    "A model with an adapter that can be switched off."
    on = True
    @contextmanager
    def disable_adapter(self):
        self.on = False
        try: yield
        finally: self.on = True

def fake_answers(say, calls: list):
    "In place of `answer_prompts`: each reply is `say(adapter on, question, its images)`, or that and its confidence. Keeps each batch in `calls`."
    def answer(model, processor, messages, images, max_new_tokens=64):
        calls.append(dict(adapter=model.on, messages=messages, images=images, max_new_tokens=max_new_tokens))
        said = [say(model.on, m[-1]["content"][-1]["text"], i) for m, i in zip(messages, images, strict=True)]
        return [x if isinstance(x, tuple) else (x, .75) for x in said]
    return answer
