"""Requests as clients and proxies send them: compressed bodies, parts and names of files, query parameters, paths."""

import gzip
import json
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.services import Services
from app.settings import Settings
from tests.helpers.api import ROW, error_of, upload

JOBS = "/v1/fine_tuning/jobs"


# -- query parameters -----------------------------------------------------------------------------------------


def test_every_route_refuses_an_unknown_query_parameter_by_name(client: TestClient, settings: Settings) -> None:
    paths = create_app(settings).openapi()["paths"]
    operations = [(method, path) for path, methods in paths.items() if path.startswith("/v1/") for method in methods]
    assert len(operations) > 50
    for method, path in operations:
        error = error_of(client.request(method, path.replace("{", "").replace("}", ""), params={"colour": "red"}), 400)
        assert (error["code"], error["param"]) == ("unknown_parameter", "colour"), path
    assert "Did you mean 'limit'?" in error_of(client.get(JOBS, params={"limt": 3}), 400)["message"]
    error_of(client.get("/v1/files", params={"metadata[a]": "b"}), 400)


KEYS = ["plain", 'a"b', "a\\b", "a.b", "a'b", "$[0]", "a]b", "line\nbreak", "é", "🙂", "", "%", "a b", "null"]


def test_a_list_can_be_asked_for_any_metadata(client: TestClient) -> None:
    body = {"model": "tiny", "training_file": upload(client)}
    made = {key: client.post(JOBS, json=body | {"metadata": {key: "v", "other": "x"}}).json()["id"] for key in KEYS}
    without = [client.post(JOBS, json=body | fields).json()["id"] for fields in ({}, {"metadata": None})]

    def listed(params: dict[str, str]) -> list[str]:
        answer = client.get(JOBS, params=params)
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]]

    for key, job_id in made.items():
        assert listed({f"metadata[{key}]": "v", "metadata[other]": "x"}) == [job_id], key
        assert not listed({f"metadata[{key}]": "another"}) and not listed({f"metadata[{key}]": "v", "metadata[y]": "x"})
    assert listed({"metadata": "null"}) == without[::-1]
    error_of(client.get(JOBS, params={"metadata": "none"}), 400)


@pytest.mark.parametrize(
    "path", ["/openai/files?api-version=2024-10-21", "/openai/v1/files", "/openai/v1/files?limit=1"]
)
def test_azures_paths_and_its_header_reach_the_api(client: TestClient, settings: Settings, path: str) -> None:
    upload(client)
    del client.headers["authorization"]
    assert len(client.get(path, headers={"api-key": settings.admin_key}).json()["data"]) == 1
    error_of(client.get(path, headers={"api-key": "wrong"}), 401)
    error_of(client.get(path), 401)
    error_of(client.get("/v1/files", headers={"api-key": settings.admin_key}), 401)


# -- compressed bodies ----------------------------------------------------------------------------------------


def send(client: TestClient, path: str, content: bytes, encoding: str = "gzip", **headers: str) -> Any:
    headers = {"content-type": "application/json", "content-encoding": encoding} | headers
    return client.post(path, content=content, headers=headers)


def test_a_gzip_body_is_read_like_a_plain_one(client: TestClient) -> None:
    body = {"model": "tiny", "training_file": upload(client), "metadata": {"key": "x" * 500}}
    packed = gzip.compress(json.dumps(body).encode())
    assert send(client, JOBS, packed).json()["metadata"] == body["metadata"]
    file = ROW * 100_000  # unpacks to several pieces
    form = b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    form += b'--xx\r\nContent-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n' + file + b"\r\n--xx--"
    multipart = {"content-type": "multipart/form-data; boundary=xx"}
    uploaded = send(client, "/v1/files", gzip.compress(form), **multipart).json()
    assert client.get(f"/v1/files/{uploaded['id']}/content").content == file


def test_a_body_that_cannot_be_unpacked_is_refused(client: TestClient) -> None:
    packed = gzip.compress(json.dumps({"model": "tiny", "training_file": "x", "seed": 1}).encode())
    for broken in (b"{}", packed[:-9], packed[:20] + b"x" * 20, b""):
        assert error_of(send(client, JOBS, broken), 400)["code"] == "invalid_encoding", broken
    assert error_of(send(client, JOBS, packed, "br"), 415)["code"] == "unknown_encoding"
    bomb = gzip.compress(b'{"model": "' + b" " * 100_000_000)
    assert error_of(send(client, JOBS, bomb), 413)["code"] == "body_too_large"


# -- the content of files -------------------------------------------------------------------------------------

SIZE = 9_000_000
"""Three pieces of the store."""
RANGES = {
    "bytes=0-0": (0, 1), "bytes=2-5": (2, 6), "bytes=4194300-4194310": (4194300, 4194311), f"bytes={SIZE - 3}-": (SIZE - 3, SIZE),
    "bytes=-7": (SIZE - 7, SIZE), f"bytes=-{2 * SIZE}": (0, SIZE), f"bytes=10-{9 * SIZE}": (10, SIZE), "Bytes = 1 - 2": (1, 3),
}  # fmt: skip
IGNORED = ["bytes=5-2", "bytes=-", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", ""]


def test_a_part_of_a_file_is_what_the_range_says(client: TestClient) -> None:
    content = bytes(number % 251 for number in range(SIZE))
    path = f"/v1/files/{upload(client, content)}/content"
    whole = client.get(path)
    assert whole.content == content and whole.headers["accept-ranges"] == "bytes"
    for asked, (start, end) in RANGES.items():
        part = client.get(path, headers={"Range": asked, "If-Range": whole.headers["etag"]})
        assert part.status_code == 206 and part.content == content[start:end], asked
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert part.headers["content-length"] == str(end - start)
    for asked in IGNORED:
        assert client.get(path, headers={"Range": asked}).headers["content-length"] == str(SIZE), asked
    assert client.get(path, headers={"Range": "bytes=0-1", "If-Range": '"another"'}).status_code == 200
    for asked in (f"bytes={SIZE}-", "bytes=-0"):
        refused = client.get(path, headers={"Range": asked})
        assert error_of(refused, 416)["code"] == "range_not_satisfiable"
        assert refused.headers["content-range"] == f"bytes */{SIZE}"
    head = client.head(path)
    assert head.content == b"" and head.status_code == 200
    assert {name: head.headers[name] for name in ("content-length", "content-disposition", "etag")} == {
        name: whole.headers[name] for name in ("content-length", "content-disposition", "etag")
    }
    assert client.head("/v1/files/file-none/content").status_code == 404


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ('filename="p.jsonl"', "p.jsonl"),
        ('filename="a%22b%0D%0Ac.jsonl"', 'a"b\r\nc.jsonl'),  # browsers and httpx
        ('filename="50%25 of it.jsonl"', "50%25 of it.jsonl"),  # they leave a percent sign alone
        (r'filename="a\"b.jsonl"', 'a"b.jsonl'),  # curl
        ('filename="ü.jsonl"', "ü.jsonl"),
        ("filename*=utf-8''%C3%BC%20x.jsonl", "ü x.jsonl"),  # urllib3
        ("filename=\"u.jsonl\"; filename*=UTF-8'de'%C3%BC.jsonl", "ü.jsonl"),
        ("filename*=ISO-8859-1''%FC.jsonl; filename=u", "ü.jsonl"),
        ("filename=\"a; filename*=UTF-8''b\"", "a; filename*=UTF-8''b"),
        ("filename*=UTF-8''%FF%00.jsonl", "\ufffd.jsonl"),
        ("filename*=nonsense", "upload"),
        ("", "upload"),
    ],
)
def test_the_name_of_a_file_is_read_as_clients_write_it(client: TestClient, sent: str, name: str) -> None:
    form = f'--xx\r\nContent-Disposition: form-data; name="file"; {sent}\r\n\r\n'.encode() + ROW
    form += b'\r\n--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--xx--'
    answer = client.post("/v1/files", content=form, headers={"content-type": "multipart/form-data; boundary=xx"})
    assert answer.json()["filename"] == name


# -- a path below the host ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["the proxy keeps the path", "the proxy removes the path"])
def test_the_service_may_be_below_a_path_of_its_host(settings: Settings, services: Services, kept: bool) -> None:
    """Every link and cookie begins with the path, whatever the proxy does with that of a request."""
    headers = {"Authorization": f"Bearer {settings.admin_key}"}
    app = create_app(settings.model_copy(update={"root_path": "/dpo"}))
    prefix = "/dpo" if kept else ""
    with TestClient(app, base_url="http://localhost", headers=headers, follow_redirects=False) as client:
        content, purpose = {"file": ("p.jsonl", ROW)}, {"purpose": "fine-tune"}
        file = client.post(f"{prefix}/v1/files", files=content, data=purpose).json()
        body = {"model": "tiny", "training_file": file["id"]}
        job = client.post(f"{prefix}/v1/fine_tuning/jobs", json=body).json()
        client.post(f"{prefix}/v1/fine_tuning/jobs/{job['id']}/cancel")
        token = client.post(f"{prefix}/v1/fine_tuning/jobs/{job['id']}/stream_token").json()
        assert token["url"].startswith("/dpo/v1/fine_tuning/jobs/")
        browser = TestClient(app, base_url="http://localhost")  # without a key
        assert browser.get(token["url"] if kept else token["url"].removeprefix("/dpo")).status_code == 200
        assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/dpo"}]
        page = client.get(f"{prefix}/docs").text
        assert '"/dpo/openapi.json"' in page
        assert all(client.get(f"{prefix}{path}").status_code == 200 for path in re.findall(r'="/dpo(/[^"]+)"', page))
        assert client.get(f"{prefix}/dashboard").headers["location"] == "/dpo/dashboard/login"
        signed_in = client.post(f"{prefix}/dashboard/login", data={"key": settings.admin_key})
        assert signed_in.headers["location"] == "/dpo/dashboard"
        cookie = signed_in.headers["set-cookie"]
        assert "Path=/dpo/dashboard;" in cookie
        session = {"Cookie": cookie.partition(";")[0]}
        pages = ["", "/evaluations", "/sweeps", f"/jobs/{job['id']}", f"/files/{file['id']}"]
        for page in (*pages, "/login"):
            answer = client.get(f"{prefix}/dashboard{page}", headers=session)
            assert answer.status_code == 200
            links = re.findall(r"""(?:href|src|action|hx-get|data-url)="([^"]*)""", answer.text)
            assert links and all(link.startswith("/dpo/dashboard") for link in links), page
        for link in re.findall(r'(?:href|src)="(/dpo/dashboard/static/[^"]*)', answer.text):
            assert client.get(link if kept else link.removeprefix("/dpo")).status_code == 200, link
        metrics = client.get(f"{prefix}/metrics").text
        assert 'route="/v1/fine_tuning/jobs"' in metrics
        assert client.get(f"{prefix}/healthz").status_code == 200
