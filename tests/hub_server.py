"""A small Hub on this machine: enough of the Hugging Face Hub's protocol for the unmodified client.

    with Hub() as hub:
        subprocess.run([...], env={**os.environ, **hub.env(token="hf_good")})

It keeps everything in memory, listens on the loopback only, checks tokens, stores visibility,
speaks Git-LFS "basic" transfers with signed upload addresses, and commits in one piece or not at
all. `hub.faults` breaks it on purpose; `hub.log` is the list of requests it saw.
"""
from __future__ import annotations
import base64, hashlib, hmac, json, re, secrets, socket, threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".arrow", ".parquet")
REGULAR_LIMIT = 10_000_000


def git_oid(data: bytes) -> str: return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
def pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


@dataclass
class File:
    oid: str                 # git blob id (of the pointer, for an LFS file)
    size: int
    lfs: str | None = None   # sha256 of the content, for an LFS file


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, str, dict[str, File]]] = field(default_factory=list)  # (oid, title, files)

    def at(self, revision: str):
        if revision == "main": return self.commits[-1]
        return next((c for c in self.commits if c[0] == revision), None)


class Problem(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more): self.status, self.message, self.code, self.more = status, message, code, more


class Hub:
    "The server and all it holds."
    def __init__(self, users: dict[str, dict] | None = None):
        # token -> who it belongs to; role read | write
        self.users = users or {"hf_good_token_of_ada": dict(name="ada", role="write", orgs=["lab"]),
                               "hf_read_token_of_bob": dict(name="bob", role="read", orgs=[])}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}   # git oid -> content
        self.lfs: dict[str, bytes] = {}     # sha256 -> content
        self.log: list[tuple[str, str, int]] = []
        self.faults: dict[str, int] = {}    # name -> how many times still
        self._key, self._lock = secrets.token_bytes(16), threading.RLock()

    # life
    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn = self.url.replace("127.0.0.1", "localhost") # another host name, as the Hub's store has
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": .05}, daemon=True).start()
        return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()

    def env(self, home, token: str | None = None) -> dict[str, str]:
        "What a client process needs in its environment. Plain LFS: this server has no Xet store."
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
               "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        return {**env, "HF_TOKEN": token} if token else env

    # helpers for tests
    def fault(self, name: str) -> bool:
        with self._lock:
            left = self.faults.get(name, 0)
            if left > 0: self.faults[name] = left - 1
            return left > 0

    def mend(self):
        "No more faults; nor one that a request in flight is about to count."
        with self._lock: self.faults.clear()

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        f = self.repos[repo_id].at(revision)[2][path]
        return self.lfs[f.lfs] if f.lfs else self.blobs[f.oid]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, File]: return self.repos[repo_id].at(revision)[2]

    def sign(self, oid: str) -> str: return hmac.new(self._key, oid.encode(), "sha256").hexdigest()

    # what the Hub does
    def create(self, who: dict, name: str, organization: str | None, visibility: str | None):
        owner = organization or who["name"]
        if owner not in (who["name"], *who["orgs"]) or who["role"] != "write":
            raise Problem(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{name}"
        if repo_id in self.repos: raise Problem(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        repo = Repo(private=visibility == "private")
        repo.commits.append((secrets.token_hex(20), "initial commit", {".gitattributes": self.store(b"*.safetensors filter=lfs\n")}))
        self.repos[repo_id] = repo
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": secrets.token_hex(12)}

    def store(self, data: bytes) -> File:
        oid = git_oid(data); self.blobs[oid] = data
        return File(oid, len(data))

    def preupload(self, files: dict[str, File], wanted: list[dict]):
        out = []
        for f in wanted:
            lfs = f["path"].endswith(LFS_SUFFIXES) or f["size"] > REGULAR_LIMIT
            old = files.get(f["path"])
            out.append({"path": f["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False,
                        **({"oid": old.lfs or old.oid} if old else {})})
        return {"files": out}

    def batch(self, repo_id: str, objects: list[dict]):
        out = []
        for o in objects:
            entry = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.lfs:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs-store/{o['oid']}?sig={self.sign(o['oid'])}", "header": {}},
                                    "verify": {"href": f"{self.url}/{repo_id}.git/info/lfs/verify", "header": {}}}
            out.append(entry)
        return {"transfer": "basic", "objects": out}

    def commit(self, repo_id: str, revision: str, lines: list[dict]):
        repo = self.repos[repo_id]
        if revision != "main": raise Problem(404, "Invalid rev id", "RevisionNotFound")
        if not lines or lines[0]["key"] != "header": raise Problem(400, "the commit has no header")
        header, files = lines[0]["value"], dict(repo.commits[-1][2])
        if not header.get("summary"): raise Problem(400, "the commit has no summary")
        if header.get("parentCommit") not in (None, repo.commits[-1][0]):
            raise Problem(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            key, v = line["key"], line["value"]
            if key == "file":
                if v.get("encoding") != "base64": raise Problem(400, "unknown encoding")
                files[v["path"]] = self.store(base64.b64decode(v["content"], validate=True))
            elif key == "lfsFile":
                if v["oid"] not in self.lfs: raise Problem(400, f"LFS pointer pointed to a file that does not exist: {v['path']}")
                data = self.lfs[v["oid"]]
                files[v["path"]] = File(git_oid(pointer(v["oid"], len(data))), len(data), v["oid"])
            elif key == "deletedFile":
                if v["path"] not in files: raise Problem(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[v["path"]]
            elif key == "deletedFolder":
                files = {p: f for p, f in files.items() if not p.startswith(v["path"].rstrip("/") + "/")}
            else: raise Problem(400, f"unknown operation {key}")
        oid = secrets.token_hex(20)
        repo.commits.append((oid, header["summary"], files))
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "hookOutput": ""}


class _Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *args): pass

    def handle(self):
        try: super().handle()
        except (ConnectionError, socket.timeout): pass

    # reading and answering
    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while n := int(self.rfile.readline().split(b";")[0], 16): parts.append(self.rfile.read(n)); self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, data: bytes | dict | list = b"", headers: dict | None = None):
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        headers = {"Content-Type": "application/octet-stream" if isinstance(data, bytes) else "application/json", **(headers or {})}
        headers.setdefault("Content-Length", str(len(raw)))
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(raw)
        self.hub.log.append((self.command, self.path.split("?sig=")[0], status))

    def drop(self):
        "Hang up in the middle, as a broken line does."
        self.hub.log.append((self.command, self.path.split("?sig=")[0], 0))
        self.close_connection = True
        try: self.connection.shutdown(socket.SHUT_RDWR)
        except OSError: pass

    def who(self) -> dict | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not given: return None
        if given not in self.hub.users: raise Problem(401, "Invalid credentials in Authorization header")
        return self.hub.users[given]

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        who, repo = self.who(), self.hub.repos.get(repo_id)
        mine = who and repo_id.split("/")[0] in (who["name"], *who["orgs"])
        if repo is None or (repo.private and not mine): raise Problem(404 if who else 401, "Repository not found", "RepoNotFound")
        if write and not (mine and who["role"] == "write"): raise Problem(403, "You are not allowed to write to this repository")
        return repo

    def at(self, repo_id: str, revision: str):
        commit = self.repo(repo_id).at(unquote(revision))
        if commit is None: raise Problem(404, "Invalid rev id", "RevisionNotFound")
        return commit

    # the routes
    def route(self):
        hub, method, url = self.hub, self.command, urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        if hub.fault("down"): return self.body(), self.answer(503, {"error": "Service unavailable"})
        m = lambda pattern: re.fullmatch(pattern, path)
        if method == "GET" and path == "/api/agent-harnesses": return self.answer(200, {})
        if method == "GET" and path == "/api/whoami-v2":
            who = self.who()
            if not who: raise Problem(401, "Invalid username or password.")
            return self.answer(200, {"type": "user", "name": who["name"], "orgs": [{"name": o} for o in who["orgs"]],
                                     "auth": {"accessToken": {"role": who["role"]}}})
        if method == "POST" and path == "/api/repos/create":
            row = json.loads(self.body()); who = self.who()
            if not who: raise Problem(401, "Invalid username or password.")
            return self.answer(200, hub.create(who, row["name"], row.get("organization"), row.get("visibility")))
        if method == "POST" and path == "/api/validate-yaml": return self.answer(*self.check_card(json.loads(self.body())["content"]))
        if method == "POST" and (g := m(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)")):
            files = json.loads(self.body())["files"]
            self.repo(g[1], write=True)
            return self.answer(200, hub.preupload(self.at(g[1], g[2])[2], files))
        if method == "POST" and (g := m(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")):
            row = json.loads(self.body()); self.repo(g[1], write=True)
            if row["operation"] != "upload" or row["hash_algo"] != "sha256" or "basic" not in row["transfers"]: raise Problem(400, "unknown transfer")
            return self.answer(200, hub.batch(g[1], row["objects"]), {"Content-Type": "application/vnd.git-lfs+json"})
        if method == "PUT" and (g := m(r"/lfs-store/([0-9a-f]{64})")):
            if self.headers.get("Authorization"): raise Problem(400, "the token was sent to the store")  # S3 refuses it too
            if not hmac.compare_digest(query.get("sig", [""])[0], hub.sign(g[1])): raise Problem(403, "bad signature")
            if hub.fault("drop_lfs"): self.rfile.read1(1024); return self.drop()
            data = self.body()
            if hashlib.sha256(data).hexdigest() != g[1]: raise Problem(400, "the content does not have this hash")
            if hub.fault("spoil_lfs"): data = data[:-1] + bytes([data[-1] ^ 1])
            hub.lfs[g[1]] = data
            return self.answer(200)
        if method == "POST" and (g := m(r"/([^/]+/[^/]+)\.git/info/lfs/verify")):
            row = json.loads(self.body()); self.repo(g[1], write=True)
            if len(hub.lfs.get(row["oid"], b"")) != row["size"]: raise Problem(422, "the object is not there")
            return self.answer(200, {})
        if method == "POST" and (g := m(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)")):
            if hub.fault("drop_commit"): self.rfile.read1(1024); return self.drop()
            data = self.body(); self.repo(g[1], write=True)
            return self.answer(200, hub.commit(g[1], g[2], [json.loads(x) for x in data.splitlines() if x.strip()]))
        if method == "GET" and (g := m(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")):
            oid, _, files = self.at(g[1], g[2] or "main")
            return self.answer(200, {"_id": "0", "id": g[1], "modelId": g[1], "author": g[1].split("/")[0], "sha": oid, "private": hub.repos[g[1]].private,
                                     "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "createdAt": "2026-01-01T00:00:00.000Z",
                                     "siblings": [{"rfilename": p} for p in sorted(files)]})
        if method == "GET" and (g := m(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")):
            if query.get("recursive") != ["true"]: raise Problem(400, "only recursive listings here")
            return self.answer(200, [{"type": "file", "path": p, "size": f.size, "oid": f.oid,
                                      **({"lfs": {"oid": f.lfs, "size": f.size, "pointerSize": len(pointer(f.lfs, f.size))}} if f.lfs else {})}
                                     for p, f in sorted(self.at(g[1], g[2])[2].items())])
        if method in ("GET", "HEAD") and (g := m(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")):
            oid, _, files = self.at(g[1], g[2])
            f = files.get(unquote(g[3]))
            if f is None: raise Problem(404, "Entry not found", "EntryNotFound")
            about = {"X-Repo-Commit": oid, "ETag": f'"{f.oid}"', "Accept-Ranges": "bytes"}
            if f.lfs:   # as on the Hub: to the store, by a signed address
                return self.answer(302, b"", {**about, "X-Linked-ETag": f'"{f.lfs}"', "X-Linked-Size": str(f.size),
                                              "Location": f"{hub.cdn}/cdn/{f.lfs}?sig={hub.sign(f.lfs)}"})
            return self.send(hub.blobs[f.oid], about)
        if method in ("GET", "HEAD") and (g := m(r"/cdn/([0-9a-f]{64})")):
            if self.headers.get("Authorization"): raise Problem(400, "the token was sent to the store")
            if not hmac.compare_digest(query.get("sig", [""])[0], hub.sign(g[1])): raise Problem(403, "bad signature")
            return self.send(hub.lfs[g[1]], {"ETag": f'"{g[1]}"'})
        self.body()
        raise Problem(404, f"this small Hub does not know {method} {path}")

    def send(self, data: bytes, headers: dict):
        "Content, or the part that `Range` asks for."
        if self.headers.get("Range") and (g := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"])):
            start, end = int(g[1]), int(g[2] or len(data) - 1)
            if start >= len(data): raise Problem(416, "range not satisfiable")
            return self.answer(206, data[start:end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
        return self.answer(200, data, {**headers, **({"Content-Length": str(len(data))} if self.command == "HEAD" else {})})

    def check_card(self, content: str):
        import yaml
        bad = lambda text: (400, {"errors": [{"message": text}], "warnings": []})
        g = re.match(r"---\n(.*?)\n---\n", content, re.S)
        if not g: return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try: meta = yaml.safe_load(g[1])
        except yaml.YAMLError as e: return bad(str(e))
        if not isinstance(meta, dict): return bad("the metadata is not a mapping")
        for key in ("tags", "datasets"):
            if key in meta and not (isinstance(meta[key], list) and all(isinstance(x, str) for x in meta[key])): return bad(f'"{key}" must be an array of strings')
        for name in [meta.get("base_model"), *meta.get("datasets", [])]:
            if name and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name): return bad(f'"{name}" is not a name on the Hub')
        if "license" in meta and not re.fullmatch(r"[a-z0-9.-]+", str(meta["license"])): return bad('"license" must be one of the known licences')
        return 200, {"errors": [], "warnings": []}

    def go(self):
        try:
            with self.hub._lock if self.command != "PUT" else threading.Lock(): self.route()
        except Problem as e:
            self.answer(e.status, {"error": e.message, **e.more}, {"X-Error-Message": e.message, **({"X-Error-Code": e.code} if e.code else {})})
            self.close_connection = True   # a body may be left unread

    do_GET = do_POST = do_PUT = do_HEAD = go
