"""minihub: tiny Hugging Face Hub look-alike for tests (loopback only), and the client of this process beside it."""

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub

PLURAL = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_EXT = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.npz", "*.nii.gz", "*.png", "*.zip")


def sha256(b):
    return hashlib.sha256(b).hexdigest()


def git_oid(b):
    return hashlib.sha1(b"blob %d\0" % len(b) + b).hexdigest()


def pointer(oid, n):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {n}\n".encode()


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


class Repo:
    def __init__(self, rid, typ, private):
        self.id, self.type, self.private = rid, typ, private
        self.commits, self.refs, self.tags = {}, {}, {}
        self.commit("main", {}, "initial commit", "")

    def commit(self, branch, tree, title, desc):
        parent = self.refs.get(branch)
        oid = hashlib.sha1(f"{self.id}{time.time_ns()}{parent}{title}".encode()).hexdigest()
        self.commits[oid] = dict(oid=oid, parent=parent, tree=tree, title=title, message=desc, date=now())
        self.refs[branch] = oid
        return oid

    def resolve(self, rev):
        rev = self.refs.get(rev) or self.tags.get(rev) or rev
        return self.commits.get(rev)


class Hub:
    def __init__(self, root, token="hf_minihub", user="tester", lfs_threshold=10 * 2**20, xet=None):
        self.root, self.token, self.user, self.thr, self.xet = root, token, user, lfs_threshold, xet
        self.repos, self.log, self.lock = {}, [], threading.Lock()
        self.reader = token + "_read"  # a token that may read only
        self.cuts = {}  # sha256 -> bytes after which the next download of it breaks off
        self.broken = set()  # sha256 of contents that cannot be had at all
        os.makedirs(os.path.join(root, "blobs"), exist_ok=True)

    def path(self, oid):
        return os.path.join(self.root, "blobs", oid)

    def files(self, rid, rev="main"):
        """Paths in a repository."""
        return set(self.repos["model", rid].resolve(rev)["tree"])

    def sha(self, rid, path, rev="main"):
        return self.repos["model", rid].resolve(rev)["tree"][path]["sha"]

    def read(self, rid, path, rev="main"):
        with open(self.path(self.sha(rid, path, rev)), "rb") as file:
            return file.read()

    def downloads(self, sha):
        """What was asked of a content: one "GET /_cdn/<sha> <range>" per request."""
        return [line for line in self.log if line.startswith(f"GET /_cdn/{sha}")]

    def put(self, data):
        oid = sha256(data)
        open(self.path(oid), "wb").write(data)
        return oid


class Err(Exception):
    def __init__(self, status, msg, code=None):
        self.status, self.msg, self.code = status, msg, code


class H(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *a):
        pass

    # -- plumbing
    def send(self, status, body=b"", ctype="application/json", **headers):
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        self.send_response(status)
        length = headers.pop("Content_Length", len(body))
        self.send_header("Content-Type", ctype)
        self.send_header("Content-Length", str(length))
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while n := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def authed(self):
        return self.headers.get("Authorization") in (f"Bearer {self.hub.token}", f"Bearer {self.hub.reader}")

    def need_auth(self, write=True):
        if not self.authed():
            raise Err(401, "Invalid username or password.")
        if write and self.headers["Authorization"] == f"Bearer {self.hub.reader}":
            raise Err(403, "You don't have the rights to write with this token.")

    def repo(self, typ, rid):
        r = self.hub.repos.get((typ, rid))
        if r is None or (r.private and not self.authed()):
            raise Err(404 if self.authed() else 401, "Repository not found", "RepoNotFound")
        return r

    def rev(self, repo, rev):
        c = repo.resolve(unquote(rev))
        if c is None:
            raise Err(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return c

    def handle_any(self):
        u = urlsplit(self.path)
        p = u.path
        q = parse_qs(u.query)
        data = None
        self.hub.log.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        data = self.body() if self.command in ("POST", "PUT", "DELETE") else b""
        try:
            if "Authorization" in self.headers and not self.authed():  # the real Hub: even for public repositories
                raise Err(401, "Invalid credentials in Authorization header")
            for method, rx, fn in ROUTES:
                if method in (self.command, "GET" if self.command == "HEAD" else "") and (m := rx.fullmatch(p)):
                    with self.hub.lock:
                        return fn(self, q, data, **m.groupdict())
            raise Err(404, f"no route {self.command} {p}")
        except Err as e:
            h = {"X_Error_Message": e.msg}
            if e.code:
                h["X_Error_Code"] = e.code
            self.send(e.status, {"error": e.msg}, **h)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # -- account / repo management
    def whoami(self, q, data):
        self.need_auth(write=False)
        self.send(
            200,
            {
                "type": "user",
                "name": self.hub.user,
                "fullname": self.hub.user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
            },
        )

    def create(self, q, data):
        self.need_auth()
        d = json.loads(data)
        typ = d.get("type") or "model"
        rid = f"{d.get('organization') or self.hub.user}/{d['name']}"
        pre = "" if typ == "model" else f"{typ}s/"
        url = f"http://{self.headers['Host']}/{pre}{rid}"
        if (typ, rid) in self.hub.repos:
            return self.send(409, {"error": "You already created this repo", "url": url})
        self.hub.repos[typ, rid] = Repo(rid, typ, d.get("visibility") == "private" or d.get("private") is True)
        self.send(200, {"url": url, "name": rid, "id": rid})

    def delete(self, q, data):
        self.need_auth()
        d = json.loads(data)
        k = (d.get("type") or "model", f"{d.get('organization') or self.hub.user}/{d['name']}")
        self.repo(*k)
        del self.hub.repos[k]
        self.send(200, {})

    def validate_yaml(self, q, data):
        self.send(200, {"errors": [], "warnings": []})

    # -- read
    def entry(self, path, e):
        d = {"type": "file", "oid": e["oid"], "size": e["size"], "path": path}
        if e["lfs"]:
            d["lfs"] = {"oid": e["sha"], "size": e["size"], "pointerSize": len(pointer(e["sha"], e["size"]))}
        return d

    def info(self, q, data, t, rid, rev="main"):
        r = self.repo(PLURAL[t], rid)
        c = self.rev(r, rev)
        self.send(
            200,
            {
                "_id": "0",
                "id": rid,
                "modelId": rid,
                "author": rid.split("/")[0],
                "sha": c["oid"],
                "private": r.private,
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": c["date"],
                "createdAt": c["date"],
                "siblings": [
                    {"rfilename": p, "size": e["size"], "blobId": e["oid"]} for p, e in sorted(c["tree"].items())
                ],
            },
        )

    def tree(self, q, data, t, rid, rev, path=""):
        c = self.rev(self.repo(PLURAL[t], rid), rev)
        rec = q.get("recursive", ["false"])[0].lower() in ("true", "1")
        pre = unquote(path).strip("/")
        pre = pre + "/" if pre else ""
        out, dirs = [], set()
        for p, e in sorted(c["tree"].items()):
            if not p.startswith(pre):
                continue
            parts = p[len(pre) :].split("/")
            for i in range(1, len(parts)):
                if rec or i == 1:
                    dirs.add(pre + "/".join(parts[:i]))
            if rec or len(parts) == 1:
                out.append(self.entry(p, e))
        if pre and not out and not dirs:
            raise Err(404, f"{pre} does not exist on {rev}", "EntryNotFound")
        self.send(
            200,
            [
                {"type": "directory", "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0, "path": d}
                for d in sorted(dirs)
            ]
            + out,
        )

    def paths_info(self, q, data, t, rid, rev):
        c = self.rev(self.repo(PLURAL[t], rid), rev)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(data)["paths"]
        else:
            paths = parse_qs(data.decode()).get("paths", [])
        out = []
        for p in paths:
            if p in c["tree"]:
                out.append(self.entry(p, c["tree"][p]))
            elif any(k.startswith(p.rstrip("/") + "/") for k in c["tree"]):
                out.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": p})
        self.send(200, out)

    def refs(self, q, data, t, rid):
        r = self.repo(PLURAL[t], rid)

        def f(d, k):
            return [{"name": n, "ref": f"refs/{k}/{n}", "targetCommit": o} for n, o in d.items()]

        self.send(200, {"branches": f(r.refs, "heads"), "tags": f(r.tags, "tags"), "converts": []})

    def commits(self, q, data, t, rid, rev):
        r = self.repo(PLURAL[t], rid)
        c = self.rev(r, rev)
        out = []
        while c:
            out.append(
                {
                    "id": c["oid"],
                    "title": c["title"],
                    "message": c["message"],
                    "date": c["date"],
                    "authors": [{"user": self.hub.user}],
                }
            )
            c = r.commits.get(c["parent"])
        self.send(200, out)

    def add_ref(self, q, data, t, rid, kind, name):
        self.need_auth()
        r = self.repo(PLURAL[t], rid)
        d = json.loads(data or b"{}")
        name = unquote(name)
        if kind == "tag":
            name, base = d["tag"], name
        else:
            base = d.get("startingPoint") or "main"
        (r.tags if kind == "tag" else r.refs)[name] = self.rev(r, base)["oid"]
        self.send(200, {})

    def resolve(self, q, data, rid, rev, path, t=None):
        r = self.repo(PLURAL[t or "models"], rid)
        c = self.rev(r, rev)
        path = unquote(path)
        e = c["tree"].get(path)
        if e is None:
            return self.send(
                404,
                {"error": "Entry not found"},
                X_Error_Code="EntryNotFound",
                X_Error_Message="Entry not found",
                X_Repo_Commit=c["oid"],
            )
        h = {"X_Repo_Commit": c["oid"], "Accept_Ranges": "bytes"}
        if e["lfs"]:  # as the real Hub: redirect to a CDN, with the linked etag and size
            return self.send(
                302,
                b"",
                X_Linked_Etag=f'"{e["sha"]}"',
                X_Linked_Size=str(e["size"]),
                ETag=f'"{e["sha"]}"',
                Location=f"http://localhost:{self.server.server_address[1]}/_cdn/{e['sha']}",
                **h,
            )
        self.blob(e["sha"], ETag=f'"{e["oid"]}"', **h)

    def cdn(self, q, data, oid):
        self.blob(oid, ETag=f'"{oid}"', Accept_Ranges="bytes")

    def blob(self, sha, **h):
        if sha in self.hub.broken:
            raise Err(500, "storage is down")
        b = open(self.hub.path(sha), "rb").read()
        if m := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            s, e = int(m[1]), min(int(m[2] or len(b) - 1), len(b) - 1)
            if s >= len(b):
                return self.send(416, b"", Content_Range=f"bytes */{len(b)}")
            return self.send(
                206, b[s : e + 1], "application/octet-stream", Content_Range=f"bytes {s}-{e}/{len(b)}", **h
            )
        cut = self.hub.cuts.pop(sha, None) if self.command == "GET" else None
        self.send(200, b[:cut], "application/octet-stream", Content_Length=len(b), **h)
        if cut is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    # -- write
    def preupload(self, q, data, t, rid, rev):
        self.need_auth()
        c = self.rev(self.repo(PLURAL[t], rid), rev)
        out = []
        for f in json.loads(data)["files"]:
            e = c["tree"].get(f["path"])
            lfs = (
                f["size"] >= self.hub.thr
                or any(fnmatch.fnmatch(f["path"], g) for g in LFS_EXT)
                or b"\0" in base64.b64decode(f["sample"])
            )
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": e and (e["sha"] if e["lfs"] else e["oid"]),
                }
            )
        self.send(200, {"files": out, "commitOid": c["oid"]})

    def lfs_batch(self, q, data, rid, t=None):
        self.need_auth()
        self.repo(PLURAL[t or "models"], rid)
        d = json.loads(data)
        base = f"http://{self.headers['Host']}"
        objs = []
        for o in d["objects"]:
            x = {"oid": o["oid"], "size": o["size"]}
            if not os.path.exists(self.hub.path(o["oid"])):
                x["actions"] = {
                    "upload": {"href": f"{base}/_lfs/{o['oid']}", "header": {}},
                    "verify": {"href": f"{base}/_lfs/{o['oid']}/verify", "header": {}},
                }
            objs.append(x)
        self.send(200, {"transfer": "basic", "objects": objs})

    def lfs_put(self, q, data, oid):
        if sha256(data) != oid:
            raise Err(400, "sha256 mismatch")
        self.hub.put(data)
        self.send(200, {})

    def lfs_verify(self, q, data, oid):
        d = json.loads(data)
        ok = os.path.exists(self.hub.path(oid)) and os.path.getsize(self.hub.path(oid)) == d["size"]
        self.send(200 if ok else 404, {})

    def commit(self, q, data, t, rid, rev):
        self.need_auth()
        r = self.repo(PLURAL[t], rid)
        rev = unquote(rev)
        head = self.rev(r, rev)
        tree = dict(head["tree"])
        hdr = {}
        for line in data.splitlines():
            if not line.strip():
                continue
            k = (o := json.loads(line))["key"]
            v = o["value"]
            if k == "header":
                hdr = v
                if v.get("parentCommit") and v["parentCommit"] != head["oid"]:
                    raise Err(412, "A commit has happened since. Please refresh and try again.")
            elif k == "file":
                b = base64.b64decode(v["content"]) if v.get("encoding") == "base64" else v["content"].encode()
                tree[v["path"]] = dict(oid=git_oid(b), sha=self.hub.put(b), size=len(b), lfs=False)
            elif k == "lfsFile":
                if not os.path.exists(self.hub.path(v["oid"])):
                    raise Err(400, f"lfs object {v['oid']} was not uploaded")
                n = os.path.getsize(self.hub.path(v["oid"]))
                tree[v["path"]] = dict(oid=git_oid(pointer(v["oid"], n)), sha=v["oid"], size=n, lfs=True)
            elif k == "deletedFile":
                if v["path"] not in tree:
                    raise Err(404, "A file with this name doesn't exist", "EntryNotFound")
                del tree[v["path"]]
            elif k == "deletedFolder":
                tree = {p: e for p, e in tree.items() if not p.startswith(v["path"].rstrip("/") + "/")}
            else:
                raise Err(400, f"unknown op {k}")
        oid = r.commit(rev, tree, hdr.get("summary", ""), hdr.get("description", ""))
        pre = "" if r.type == "model" else f"{r.type}s/"
        self.send(
            200,
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"http://{self.headers['Host']}/{pre}{rid}/commit/{oid}",
                "hookOutput": "",
            },
        )

    def xet_token(self, q, data, t, rid, mode, rev):
        self.need_auth()
        self.repo(PLURAL[t], rid)
        if not self.hub.xet:
            raise Err(404, "no xet storage")
        exp = int(time.time()) + 3600
        self.send(
            200,
            {"accessToken": "xet", "exp": exp, "casUrl": self.hub.xet},
            X_Xet_Cas_Url=self.hub.xet,
            X_Xet_Access_Token="xet",
            X_Xet_Token_Expiration=str(exp),
        )


API = r"/api/(?P<t>models|datasets|spaces)/(?P<rid>[^/]+/[^/]+)"
GIT = r"/(?:(?P<t>datasets|spaces)/)?(?P<rid>[^/]+/[^/]+)"
ROUTES = [
    (m, re.compile(rx), fn)
    for m, rx, fn in [
        ("GET", r"/api/whoami-v2", H.whoami),
        ("POST", r"/api/repos/create", H.create),
        ("DELETE", r"/api/repos/delete", H.delete),
        ("POST", r"/api/validate-yaml", H.validate_yaml),
        ("POST", API + r"/preupload/(?P<rev>[^/]+)", H.preupload),
        ("POST", API + r"/commit/(?P<rev>[^/]+)", H.commit),
        (
            "GET",
            API + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?",
            lambda s, q, d, path=None, **k: s.tree(q, d, path=path or "", **k),
        ),
        ("POST", API + r"/paths-info/(?P<rev>[^/]+)", H.paths_info),
        ("GET", API + r"/refs", H.refs),
        ("GET", API + r"/commits/(?P<rev>[^/]+)", H.commits),
        ("GET", API + r"/xet-(?P<mode>read|write)-token/(?P<rev>[^/]+)", H.xet_token),
        ("POST", API + r"/(?P<kind>branch|tag)/(?P<name>[^/]+)", H.add_ref),
        ("GET", API + r"/revision/(?P<rev>[^/]+)", H.info),
        ("GET", API, H.info),
        ("POST", GIT + r"\.git/info/lfs/objects/batch", H.lfs_batch),
        ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", H.lfs_put),
        ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", H.lfs_verify),
        ("GET", r"/_cdn/(?P<oid>[0-9a-f]{64})", H.cdn),
        ("GET", GIT + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)", H.resolve),
    ]
]


def serve(root, port=0, **kw):
    hub = Hub(root, **kw)
    srv = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (H,), {"hub": hub}))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    return srv, hub


@contextmanager
def connected(root, monkeypatch):
    """A server, and huggingface_hub's own client in this process pointed at it and signed in; yields the `Hub`.

    The client reads its address, its cache and whether it is offline from constants that are set when it is imported.
    """
    server, hub = serve(os.path.join(root, "hub"))
    hub.server = server
    hub.url, hub.cache = f"http://127.0.0.1:{server.server_address[1]}", os.path.join(root, "cache")
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HUB_CACHE": hub.cache,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # docs/pitfalls.md, P9
        "HF_TOKEN_PATH": os.path.join(root, "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    if "transformers.utils.hub" in sys.modules:  # keeps a client of its own
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    hub.environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": os.path.join(root, "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }  # the same for another process
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
