"An engine without a model, and a program that speaks to a page as Gradio's own script does: for the tests of the pages' borders."
import http.client, json, re, secrets, socket, time
from contextlib import contextmanager
from urllib.parse import quote
from medchat.app import build_page
from medchat.server import at_home, launch_page
from medchat.session import Desk


class Scripted:
    "Answers with the question and with what it knows of the conversation; `endless` in a question goes on until somebody stops it."
    host, pause, running, has_probabilities = "", .01, 0, True
    def __init__(self, name="scripted"): self.name, self.identity = name, dict(model=name, base="none", base_sha256="0" * 64, adapter_sha256="")
    def new_memory(self): return type("Memory", (), {"tokens": []})()
    def stream(self, messages, images, max_new_tokens=128, stop=None, form=None, memory=None):
        said = messages[-1]["content"][-1]["text"]
        if form is not None: yield from self.fill(form); return
        Scripted.running += 1
        try:
            for word in f"You asked: {said[:200]} Turn {sum(m['role'] == 'user' for m in messages)} with {len(images)} image of {images[-1].size[0]} pixels.".split() + ["word"] * (10**6 if "endless" in said else 0):
                if stop is not None and stop.is_set(): return
                yield word + " "
                if "endless" in said: time.sleep(self.pause)
        finally: Scripted.running -= 1
    def fill(self, form):
        def value(s): return s["enum"][0] if "enum" in s else {k: value(v) for k, v in s["properties"].items()} if s.get("type") == "object" else [value(s["items"])] if s.get("type") == "array" else "Clear lungs."
        made = value(form)
        yield json.dumps(made) if form.get("type") == "object" else made
    def choose(self, messages, images, choices, memory=None): return [.8, *[.2 / (len(choices) - 1)] * (len(choices) - 1)]
    def sample(self, messages, images, n=8, **more): return ["yes"] * n


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]

@contextmanager
def served(desk=None, auth=None, launch={}, **more):
    "A page in this process, and a client of it."
    with at_home() as folder:
        page = build_page(desk or Desk([Scripted()], folder, per_minute=10**6), "scripted", **more)
        launch_page(page, port := free_port(), auth=auth, **launch)
        client = Client(page, port)
        client.folder = folder
        try: yield client
        finally: page.close(verbose=False)


class Client:
    "One visitor: a session, perhaps a cookie."
    def __init__(self, page, port, session=None): self.page, self.port, self.session, self.cookie = page, port, session or secrets.token_hex(8), ""
    @property
    def address(self): return f"http://127.0.0.1:{self.port}"
    def another(self, session=None): return Client(self.page, self.port, session)

    def call(self, method, path, body=None, headers=(), timeout=30, whole=True):
        "(status, headers in small letters, bytes or the first of them); a dict or a list goes as JSON."
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = {"Host": f"127.0.0.1:{self.port}", **({"Cookie": self.cookie} if self.cookie else {}), **dict(headers)}
        if body is not None and not isinstance(body, bytes): body, sent = json.dumps(body).encode(), {"Content-Type": "application/json", **sent}
        try:
            try: line.request(method, path, body=body, headers=sent)
            except (BrokenPipeError, ConnectionResetError): pass # refused before all of it was sent: there is a reply
            reply = line.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read() if whole else reply.read1(2000)
        finally: line.close()

    def login(self, name, password):
        status, headers, _ = self.call("POST", "/login", f"username={quote(name)}&password={quote(password)}".encode(), {"Content-Type": "application/x-www-form-urlencoded"})
        if status == 200: self.cookie = re.search(r"(access-token-unsecure-[^=]+=[^;]+)", headers["set-cookie"]).group(1)
        return status

    def upload(self, data, name="film.png", kind="image/png"):
        "Send a file; (status, its path on the server or what was said)."
        mark = secrets.token_hex(8)
        body = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: {kind}\r\n\r\n'.encode() + data + f"\r\n--{mark}--\r\n".encode()
        status, _, text = self.call("POST", "/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={mark}"})
        return status, json.loads(text)[0] if status == 200 else text.decode()

    def join(self, fn, data, trigger=None, event_data=None, **more):
        body = dict(fn_index=fn, data=data, session_hash=self.session, trigger_id=trigger, event_data=event_data) | more
        return self.call("POST", "/gradio_api/queue/join", body)

    def events(self, wait=20):
        "What the server has to say to this session, until it is done."
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=wait)
        line.request("GET", f"/gradio_api/queue/data?session_hash={self.session}", headers={"Host": f"127.0.0.1:{self.port}", **({"Cookie": self.cookie} if self.cookie else {})})
        reply = line.getresponse()
        try:
            for text in reply:
                if text.startswith(b"data: "):
                    yield (event := json.loads(text[6:]))
                    if event["msg"] in ("process_completed", "close_stream", "unexpected_error"): return
        finally: line.close(); reply.close()

    def by_queue(self, fn, data, **more):
        "(did it work, what came out at last)."
        status, _, text = self.join(fn, data, **more)
        if status != 200: return False, dict(status=status, error=text.decode())
        last = [e for e in self.events() if e["msg"] == "process_completed"][-1]
        return last["success"], last["output"]

    def direct(self, fn, data, **more):
        "The same without the queue: (status, JSON)."
        status, _, text = self.call("POST", "/gradio_api/run/predict", dict(fn_index=fn, data=data, session_hash=self.session) | more)
        try: return status, json.loads(text)
        except ValueError: return status, text.decode("utf-8", "replace")[:300]

    def fn(self, part, event=None):
        "The number of the first function that a part (by its elem_id, or `api:name`) sets off."
        if part.startswith("api:"): return next(k for k, f in self.page.fns.items() if f.api_name == part[4:])
        ids = [b._id for b in self.page.blocks.values() if getattr(b, "elem_id", None) == part]
        return next(k for k, f in self.page.fns.items() if any(t in ids and event in (None, e) for t, e in f.targets))

    def part(self, name): return next(b._id for b in self.page.blocks.values() if getattr(b, "elem_id", None) == name)

    def blank(self, fn): return [None] * len(self.page.fns[fn].inputs)

    def data(self, fn, **values):
        "The inputs of a function as the page would send them untouched, with some of them named by elem_id or label."
        def value(b): return values.get(getattr(b, "elem_id", None) or getattr(b, "label", None) or "", None if b.stateful else getattr(b, "value", None) if not callable(getattr(b, "value", None)) else None)
        return [value(b) for b in self.page.fns[fn].inputs]

    def ask(self, film, question):
        "A question by name, about an uploaded file: the whole reply."
        good, out = self.by_queue(self.fn("api:ask"), [as_file(film), question, ""])
        assert good, out
        return out["data"][0]


def as_file(path, **more): return dict(path=path, meta={"_type": "gradio.FileData"}) | more

@contextmanager
def listening():
    "A socket that counts who comes: what an address in place of a file would reach."
    with socket.create_server(("127.0.0.1", 0)) as s:
        s.settimeout(.2)
        def visits():
            n = 0
            while True:
                try: s.accept()[0].close(); n += 1
                except TimeoutError: return n
        yield s.getsockname()[1], visits
