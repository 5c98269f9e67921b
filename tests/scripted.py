"An engine without a model: it says what it is told to, at a speed, and keeps what it was given."
import json, threading, time
from types import SimpleNamespace


class Scripted:
    """Says `say` (a text, or a function of the question), piece by piece; without it, what it was asked.

    A question with "fail" breaks it after the first piece, "long" takes 4 seconds, "endless" goes on until it is stopped."""
    has_probabilities, guard, now, most = True, threading.Lock(), 0, 0 # now, most: how many engines speak at once, and ever did
    def __init__(self, say=None, name="parrot", host="", pause=0.):
        self.say, self.name, self.host, self.pause, self.calls, self.identity = say, name, host, pause, [], dict(model=name, host=host) if host else dict(model=name, base="none", base_sha256="0" * 64, adapter_sha256="1" * 64)

    def new_memory(self): return SimpleNamespace(tokens=[])

    def _pieces(self, text, turn, shown):
        if self.say is not None: yield from (word + " " for word in (self.say if isinstance(self.say, str) else self.say(text)).split(" ")); return
        yield from (" " + word for word in f"You asked {text} and this is turn {turn} about {shown} image.".split(" "))
        if "fail" in text: raise RuntimeError("CUDA out of memory at /srv/ada/x.py")
        yield from [" word."] * (200 if "long" in text else 9999 if "endless" in text else 0)

    def stream(self, messages, images, max_new_tokens=128, stop=None, form=None, memory=None):
        text = messages[-1]["content"][-1]["text"]
        self.calls.append((messages, list(images)))
        with Scripted.guard: Scripted.now += 1; Scripted.most = max(Scripted.most, Scripted.now)
        try:
            if form: yield self._obeying(form); return
            if memory is not None: memory.tokens = []
            for piece in self._pieces(text, (len(messages) + 1) // 2, len(images)):
                if stop is not None and stop.is_set(): return
                time.sleep(self.pause)
                if memory is not None: memory.tokens.append((piece, .9))
                yield piece
        finally:
            with Scripted.guard: Scripted.now -= 1

    def _obeying(self, form):
        if "enum" in form: return form["enum"][0]
        return "seen by the script" if form["type"] == "string" else json.dumps({name: [{"site": "rectum", "finding": "a polyp"}] for name in form["properties"]})

    def choose(self, messages, images, choices, memory=None): return [.9, .02, .03, .05][:len(choices)]

    def sample(self, messages, images, n=8, temperature=1., max_new_tokens=64, seed=0): return ["yes", "no"] * (n // 2)
