"""The proxies of docs/how-to/put-behind-a-proxy.md and of docker-compose.yml, run in front of a service."""

import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import yaml

from tests.helpers.certificates import Certificate, make_certificate
from tests.helpers.documents import ROOT, blocks
from tests.helpers.servers import CEILING, free_port, wait_until
from tests.helpers.service import Running, running

PAGE = ROOT / "docs" / "how-to" / "put-behind-a-proxy.md"
FILES = {block.markers["file"]: block.text for block in blocks(PAGE) if "file" in block.markers}
FILES = {name: text.replace("dpo.example.com", "localhost") for name, text in FILES.items()}
Proxy = Callable[[Path, int, str, Certificate], list[str]]
"""(folder, port, address of the API, certificate) → the command of a proxy whose files are in the folder."""


def nginx(folder: Path, port: int, upstream: str, certificate: Certificate) -> list[str]:
    """The page's `server`, in a whole file of nginx."""
    server = FILES["nginx.conf"].replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    server = server.replace("/etc/ssl/dpo.pem", str(certificate.certificate))
    server = server.replace("/etc/ssl/dpo.key", str(certificate.key)).replace("127.0.0.1:8000", upstream)
    places = " ".join(f"{name}_temp_path {folder};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; events {{}}\nhttp {{ access_log off; {places}\n{server}\n}}\n"
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", "stderr"]


def caddy(folder: Path, port: int, upstream: str, certificate: Certificate) -> list[str]:
    """The page's site. Here it has a certificate of its own, because it cannot ask for one."""
    site = FILES["Caddyfile"].replace("localhost {", _site(port, certificate)).replace("127.0.0.1:8000", upstream)
    return _caddy(folder, f"{{\n{NO_ADMIN}}}\n{site}")


def caddy_of_compose(folder: Path, port: int, upstream: str, certificate: Certificate) -> list[str]:
    """The file in docker-compose.yml. `DPO_SITE` is a domain there."""
    content = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["configs"]["proxy"]["content"]
    content = content.replace("{$$DPO_SITE} {", _site(port, certificate)).replace("api:8000", upstream)
    return _caddy(folder, content.replace("{", f"{{\n{NO_ADMIN}", 1))


NO_ADMIN = "    admin off\n    auto_https off\n"


def _site(port: int, certificate: Certificate) -> str:
    return f"https://localhost:{port} {{\n    bind 127.0.0.1\n    tls {certificate.certificate} {certificate.key}"


def _caddy(folder: Path, content: str) -> list[str]:
    (folder / "Caddyfile").write_text(content)
    return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@contextmanager
def behind(proxy: Proxy, folder: Path, service: Running, path: str = "") -> Iterator[httpx2.Client]:
    """A client that reaches a service through a proxy, over TLS and below `path`."""
    program = "nginx" if "nginx" in proxy.__name__ else "caddy"
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not here; `make test` as root on Debian installs it")
    certificate, port = make_certificate(folder), free_port()
    upstream = service.url.removeprefix("http://").removesuffix("/v1")
    command = proxy(folder, port, upstream, certificate)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    trusted = ssl.create_default_context(cafile=str(certificate.authority))
    url, headers = f"https://localhost:{port}{path}/v1", {"Authorization": f"Bearer {service.key}"}
    try:
        with httpx2.Client(base_url=url, headers=headers, verify=trusted, timeout=60) as client:
            wait_until(lambda: client.get("/models").is_success, f"{program} ({folder}/log)", process)
            yield client
    finally:
        process.terminate()
        process.wait(CEILING)


@pytest.fixture(params=[nginx, caddy, caddy_of_compose], ids=lambda proxy: proxy.__name__)
def client(request: pytest.FixtureRequest, tmp_path: Path, service: Running) -> Iterator[httpx2.Client]:
    with behind(request.param, tmp_path, service) as client:
        yield client


def nginx_below(folder: Path, port: int, upstream: str, certificate: Certificate) -> list[str]:
    """The page's `server` with the path `/dpo`, as its last line says."""
    command = nginx(folder, port, upstream, certificate)
    file = folder / "nginx.conf"
    file.write_text(file.read_text().replace("location / {", "location /dpo/ {"))
    return command


def caddy_below(folder: Path, port: int, upstream: str, certificate: Certificate) -> list[str]:
    """The page's site with the path `/dpo`, as its last sentence says."""
    command = caddy(folder, port, upstream, certificate)
    file = folder / "Caddyfile"
    site, mark, proxy = file.read_text().partition("    reverse_proxy")
    file.write_text(f"{site}    handle /dpo/* {{\n{mark}{proxy}}}\n")
    return command


@pytest.mark.parametrize("proxy", [nginx_below, caddy_below])
def test_a_proxy_may_serve_the_api_below_a_path(proxy: Proxy, tmp_path: Path, home: Path) -> None:
    with running(home, {"DPO_ROOT_PATH": "/dpo"}) as service, behind(proxy, tmp_path, service, "/dpo") as client:
        root = str(client.base_url).removesuffix("v1/")
        assert client.get(f"{root}healthz").is_success
        page = client.get(f"{root}dashboard/login")
        assert page.is_success and "/dpo/dashboard/static" in page.text


def test_a_large_file_passes_a_proxy(client: httpx2.Client) -> None:
    content = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'
    uploaded = client.post("/files", files={"file": ("large.jsonl", content)}, data={"purpose": "fine-tune"})
    assert uploaded.is_success, uploaded.text
    path = f"/files/{uploaded.json()['id']}"
    assert client.get(f"{path}/content").content == content
    client.delete(path).raise_for_status()


def test_events_pass_a_proxy_while_the_stream_is_open(client: httpx2.Client) -> None:
    """A proxy that buffers would keep the first event until many have come, or until the stream ends."""
    row = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    file = client.post("/files", files={"file": ("p.jsonl", row)}, data={"purpose": "fine-tune"}).json()["id"]
    body = {"model": "tiny", "training_file": file, "method": {"type": "dpo"}}
    job = client.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    client.post(f"/fine_tuning/jobs/{job}/pause").raise_for_status()
    with client.stream("GET", f"/fine_tuning/jobs/{job}/stream") as stream:
        assert any(line.startswith("data:") for line in stream.iter_lines())
        client.post(f"/fine_tuning/jobs/{job}/cancel").raise_for_status()
    client.delete(f"/files/{file}").raise_for_status()


def test_the_service_sees_the_scheme_of_the_client(client: httpx2.Client) -> None:
    """The dashboard's cookie is for HTTPS only, as the client speaks it. `FORWARDED_ALLOW_IPS` trusts this machine."""
    root = str(client.base_url).removesuffix("v1/")
    key = client.headers["Authorization"].removeprefix("Bearer ")
    answer = client.post(f"{root}dashboard/login", data={"key": key}, headers={"Origin": root.rstrip("/")})
    assert "secure" in answer.headers["set-cookie"].lower()
