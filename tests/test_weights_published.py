import hashlib
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from swin_dense.config import VARIANTS
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.weights import published
from swin_dense.weights.published import NAMES, PUBLISHED, PublishedFile, find_published, resolve

HEADS = ("classifier", "mask_rcnn", "cascade_mask_rcnn", "upernet", None)
CONTENT = bytes(range(251)) * 257
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILES = sorted({file.url for file in PUBLISHED.values()})


class Server(ThreadingHTTPServer):
    """Serves CONTENT at the paths in `paths`, or does what `answer` says; counts the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.paths = {"/weights.pth"}
        self.requests = []
        self.answer = send_whole
        self.cache = None
        self.released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path in self.server.paths:
            self.server.answer(self)
        else:
            self.send_error(404)

    def send_head(self, length, kind="application/octet-stream"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_):
        pass


def send_whole(handler):
    handler.send_head(len(CONTENT))
    handler.wfile.write(CONTENT)


def send_half(handler):
    handler.send_head(len(CONTENT))
    handler.wfile.write(CONTENT[: len(CONTENT) // 2])


def send_half_and_stall(handler):
    send_half(handler)
    handler.server.released.wait(10)


def send_half_and_interrupt(handler):
    send_half(handler)
    while not any(path.stat().st_size for path in handler.server.cache.glob("*.partial")):
        time.sleep(0.001)
    # To the thread that waits for data: another one would take note, and leave it waiting.
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    handler.server.released.wait(10)


def send_page(handler):
    handler.send_head(len(CONTENT), "text/html; charset=utf-8")
    handler.wfile.write(CONTENT)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(published, "HUGGING_FACE", server.address)
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cache, which does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def publish(server, monkeypatch):
    def publish(sha256_prefix=None, url=None):
        """Let "coco" of swin_t be a file of the server."""
        file = PublishedFile(url or f"{server.address}/weights.pth", sha256_prefix, "", "")
        monkeypatch.setattr(published, "PUBLISHED", {("coco", "swin_t", None): file})
        return file

    return publish


def left_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- The table.


def test_table_has_known_names_variants_and_heads():
    assert NAMES == ("imagenet1k", "imagenet22k", "coco", "ade20k")
    for name, variant, head in PUBLISHED:
        assert name in NAMES and variant in VARIANTS and head in HEADS


@pytest.mark.parametrize("url", FILES)
def test_table_addresses_are_whole_https_addresses_of_files(url):
    parts = urlsplit(url)
    assert parts.scheme == "https" and parts.hostname in ("github.com", "download.openmmlab.com")
    assert re.fullmatch(r"(/[\w.-]+)+\.pth", parts.path) and not parts.query and not parts.fragment


def test_table_has_the_hash_of_every_name_that_ends_in_one():
    for file in PUBLISHED.values():
        found = re.search(r"-([0-9a-f]{8})\.pth$", file.url)
        assert (found is not None) == ("openmmlab" in file.url)
        if found:
            assert file.sha256_prefix == found[1]
        elif file.sha256_prefix is not None:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256_prefix)


def test_table_has_no_two_addresses_with_one_name_in_the_cache():
    names = [url.rpartition("/")[2] for url in FILES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "variant", "head"), [key for key in PUBLISHED if key[2] is not None])
def test_table_names_files_of_their_variant_data_and_head(name, variant, head):
    config, file_name = VARIANTS[variant], PUBLISHED[name, variant, head].url.rpartition("/")[2]
    size = {"t": "tiny", "s": "small", "b": "base", "l": "large"}[re.search(r"swin_(?:v2_)?(\w)", variant)[1]]
    assert f"{'swinv2' if config.version == 2 else 'swin'}_{size}_patch{config.patch_size}" in file_name
    windows = re.search(r"window(\d+)(?:to(\d+))?_?", file_name)
    pretrained = config.stage_pretrained_window_size(0) if config.version == 2 else config.stage_window_size(0)
    assert int(windows[1]) == pretrained
    assert windows[2] is None or int(windows[2]) == config.stage_window_size(0)
    start = {"classifier": "swin", "mask_rcnn": "mask_rcnn_swin", "cascade_mask_rcnn": "cascade_mask_rcnn_swin"}
    assert file_name.startswith(start.get(head, "upernet_swin"))
    if head == "classifier":
        assert file_name.endswith("22k.pth") == (name == "imagenet22k")


def test_bare_backbone_has_the_file_of_a_head_and_of_mask_rcnn_before_cascade():
    for (name, variant, head), file in PUBLISHED.items():
        if head is None:
            heads = [other for other in HEADS[:-1] if (name, variant, other) in PUBLISHED]
            assert file == PUBLISHED[name, variant, heads[0]]
        else:
            assert (name, variant, None) in PUBLISHED


def test_find_published_gives_a_file_or_says_what_there_is():
    for name in NAMES:
        of_name = {(variant, head) for other, variant, head in PUBLISHED if other == name}
        for variant in VARIANTS:
            for head in HEADS:
                own = head if any(other == head for _, other in of_name) else None
                if (variant, own) in of_name:
                    assert find_published(name, variant, head) is PUBLISHED[name, variant, own]
                    continue
                with pytest.raises(ConfigError) as error:
                    find_published(name, variant, head)
                listed, _, others = str(error.value).partition(f"for {variant} there are ")[2].partition("; ")
                expected = [f"{n} ({h})" for n, v, h in PUBLISHED if v == variant and h is not None]
                assert listed == (", ".join(expected) or "none")
                assert set(re.findall(r"swin_\w+", others)) == {v for v, h in of_name if h == own}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("imagenet-22k", "swin_t", None), "no published weights 'imagenet-22k'; did you mean 'imagenet22k'?"),
        (("coco", "swim_t", None), "there is no Swin variant 'swim_t'; did you mean 'swin_t'?"),
        (("coco", None, "mask_rcnn"), "weights='coco' are published for named variants only"),
        (("coco", "swin_l", "mask_rcnn"), "no weights 'coco' (mask_rcnn) are published for swin_l"),
    ],
)
def test_find_published_names_what_is_wrong(words, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        find_published(*words)


# ---- The cache.


@pytest.mark.parametrize("sha256_prefix", [None, SHA256[:8], SHA256])
def test_resolve_downloads_once(publish, server, cache, sha256_prefix):
    publish(sha256_prefix)
    path = resolve("coco", "swin_t", "mask_rcnn")
    assert path == cache / "weights.pth" and path.read_bytes() == CONTENT
    assert resolve("coco", "swin_t", "mask_rcnn") == path
    assert server.requests == ["/weights.pth"] and left_in(cache) == ["weights.pth"]


def test_resolve_takes_what_others_left_in_the_cache(publish, server, cache):
    publish(SHA256[:8])
    cache.mkdir(parents=True)
    (cache / "weights.pth").write_bytes(CONTENT)
    assert resolve("coco", "swin_t") == cache / "weights.pth" and not server.requests


def test_resolve_gives_whole_files_to_all_who_ask_at_once(publish, cache):
    publish()
    with ThreadPoolExecutor(5) as pool:
        contents = list(pool.map(lambda _: resolve("coco", "swin_t").read_bytes(), range(5)))
    assert contents == [CONTENT] * 5 and left_in(cache) == ["weights.pth"]


def test_resolve_keeps_nothing_with_another_checksum(publish, cache):
    publish("0123abcd")
    with pytest.raises(CheckpointError, match=f"its SHA-256 starts with {SHA256[:8]}, not with 0123abcd"):
        resolve("coco", "swin_t")
    assert not left_in(cache)


def test_resolve_names_and_keeps_a_cached_file_with_another_checksum(publish, server, cache):
    file = publish("0123abcd")
    cache.mkdir(parents=True)
    (cache / "weights.pth").write_bytes(CONTENT)
    with pytest.raises(CheckpointError) as error:
        resolve("coco", "swin_t")
    message = str(error.value)
    assert message.startswith(
        f"{cache / 'weights.pth'}: its SHA-256 starts with {SHA256[:8]}, that of {file.url} with 0123"
    )
    assert "Delete it" in message
    assert (cache / "weights.pth").read_bytes() == CONTENT and not server.requests


# ---- Downloads that fail.


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (send_half, f"the connection broke off after {len(CONTENT) // 2} of {len(CONTENT)} bytes"),
        (send_half_and_stall, "timed out"),
        (send_page, "the address leads to a web page, not to a file"),
        (lambda handler: handler.send_error(503), "HTTP 503 Service Unavailable"),
    ],
)
def test_failed_download_leaves_nothing_and_says_where_the_file_belongs(
    publish, server, cache, monkeypatch, answer, reason
):
    monkeypatch.setattr(published, "_STALLED_AFTER_S", 0.2)
    server.answer = answer
    file = publish()
    with pytest.raises(CheckpointError) as error:
        resolve("coco", "swin_t")
    message = str(error.value)
    assert message.startswith(f"{file.url}: cannot be downloaded (") and reason in message
    assert f"the folder {cache} under the name weights.pth" in message and "\n" not in message.strip()
    assert not left_in(cache)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/weights.pth",
        "http://127.0.0.1:1/two words.pth",
        "http://127.0.0.1:1/größe.pth",
        "file:///no/such/folder/weights.pth",
    ],
)
def test_unreachable_address_is_one_message(publish, cache, url):
    publish(url=url)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(url)}: cannot be downloaded \(.+\)\. .*{re.escape(str(cache))}"
    ):
        resolve("coco", "swin_t")
    assert not left_in(cache)


def test_interrupted_download_leaves_nothing_and_the_next_one_succeeds(publish, server, cache, monkeypatch):
    monkeypatch.setattr(published, "_CHUNK_BYTES", 5000)
    publish()
    server.answer, server.cache = send_half_and_interrupt, cache
    with pytest.raises(KeyboardInterrupt):
        resolve("coco", "swin_t")
    assert not left_in(cache)
    server.answer = send_whole
    assert resolve("coco", "swin_t").read_bytes() == CONTENT


def test_cache_that_cannot_be_made_is_one_message(publish, cache):
    publish()
    cache.parent.parent.write_bytes(b"a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(.*\)"):
        resolve("coco", "swin_t")


# ---- Torchvision, Hugging Face, addresses, paths.


def torchvision_members():
    from torchvision import models

    return [
        member for size in "TSB" for version in ("", "V2_") for member in vars(models)[f"Swin_{version}{size}_Weights"]
    ]


def test_torchvision_weights_are_the_files_that_torchvision_names(cache):
    cache.mkdir(parents=True)
    members = torchvision_members()
    assert len(members) == 6
    for member in members:
        path = cache / Path(urlsplit(member.url).path).name
        path.write_bytes(CONTENT)
        for words in (member, str(member)):
            with pytest.raises(CheckpointError) as error:  # of the right name, address and hash, but not the file
                resolve(words)
            expected = f"that of {member.url} with {re.search('-([0-9a-f]+)[.]pth', path.name)[1]};"
            assert str(error.value).startswith(f"{path}: ") and expected in str(error.value)


def test_any_enumeration_member_with_an_address_is_downloaded(server, cache):
    assert resolve(SimpleNamespace(url=f"{server.address}/weights.pth")) == cache / "weights.pth"


def test_hugging_face_prefers_safetensors(server, cache):
    server.paths = {"/owner/name/resolve/main/model.safetensors", "/owner/name/resolve/main/pytorch_model.bin"}
    path = resolve("huggingface:owner/name")
    assert path == cache / "owner--name--model.safetensors" and path.read_bytes() == CONTENT
    assert resolve("huggingface:owner/name") == path and len(server.requests) == 1


def test_hugging_face_falls_back_to_bin_once(server, cache):
    server.paths = {"/owner/a.b-c_1/resolve/main/pytorch_model.bin"}
    path = resolve("huggingface:owner/a.b-c_1")
    assert path == cache / "owner--a.b-c_1--pytorch_model.bin"
    requests = list(server.requests)
    assert resolve("huggingface:owner/a.b-c_1") == path and server.requests == requests


def test_hugging_face_files_of_two_repositories_or_revisions_do_not_meet(server, cache):
    names = ("a/x/resolve/main", "a/y/resolve/main", "a/x/resolve/v2", "a/main/resolve/main")
    urls = [f"{server.address}/{name}/model.safetensors" for name in names]
    server.paths = {urlsplit(url).path for url in urls}
    paths = [resolve(SimpleNamespace(url=url)) for url in urls]
    assert len(set(paths)) == len(urls) and paths[0] == resolve("huggingface:a/x")


def test_hugging_face_repository_without_weights_is_one_message(server, cache):
    with pytest.raises(
        CheckpointError, match=r"huggingface:owner/name: .* neither model.safetensors nor pytorch_model"
    ):
        resolve("huggingface:owner/name")
    assert not left_in(cache)


def test_hugging_face_out_of_order_is_not_called_missing(server):
    server.paths = {"/owner/name/resolve/main/model.safetensors"}
    server.answer = lambda handler: handler.send_error(500)
    with pytest.raises(CheckpointError, match="HTTP 500"):
        resolve("huggingface:owner/name")


def test_address_is_looked_up_by_its_file_name(cache):
    cache.mkdir(parents=True)
    (cache / "swin.pth").write_bytes(CONTENT)
    assert resolve("https://example.invalid/some/swin.pth?download=true") == cache / "swin.pth"


def test_paths_stay_as_they_are(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(CONTENT)
    assert resolve(file) is file and resolve(str(file)) == file
    assert resolve(Path("coco")) == Path("coco")


def test_file_in_the_working_folder_does_not_hide_a_name(publish, tmp_path, monkeypatch, cache):
    publish()
    monkeypatch.chdir(tmp_path)
    for name in ("coco", "Swin_T_Weights.pth"):
        Path(name).write_bytes(b"")
    assert resolve("coco", "swin_t") == cache / "weights.pth"
    assert resolve("./coco") == Path("coco")
    assert resolve("Swin_T_Weights.pth") == Path("Swin_T_Weights.pth")


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        ("swin_t.pth", CheckpointError, "there is no file swin_t.pth, and there are no published weights of that name"),
        ("swin_t.pth", CheckpointError, "known are ade20k, coco, imagenet1k, imagenet22k."),
        ("imagenet-1k", CheckpointError, "did you mean 'imagenet1k'?"),
        ("coco", ConfigError, "this model has a configuration of its own"),
        ("Swin_T_Weights.IMAGENET1K_V7", ConfigError, "did you mean 'Swin_T_Weights.IMAGENET1K_V1'?"),
        ("http://example.invalid/a.pth", ConfigError, "from https addresses only"),
        ("https://example.invalid/", ConfigError, "the address ends in no file name"),
        ("huggingface:name", ConfigError, "are named huggingface:owner/name, got huggingface:name"),
        (True, ConfigError, "weights must be a path, one of imagenet1k, imagenet22k, coco, ade20k"),
    ],
)
def test_resolve_names_what_is_wrong(words, kind, text, cache):
    with pytest.raises(kind, match=re.escape(text)):
        resolve(words)
    assert not left_in(cache)
