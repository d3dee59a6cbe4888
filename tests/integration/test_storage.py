"""The storage module behaves the same on a folder and on S3."""

import io
import os
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import boto3
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from app.archive import folder, tar
from app.storage import WRITE_CHUNK_BYTES, Storage
from app.stored_content import UNKNOWN
from tests.helpers.certificates import make_certificate
from tests.helpers.documents import ROOT, blocks
from tests.helpers.servers import s3


@pytest.fixture(scope="module")
def s3_environment() -> Iterator[dict[str, str]]:
    with s3() as environment:
        yield environment


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "file":
        return Storage(f"file://{tmp_path}/objects")
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    return Storage(f"s3://dpo/{tmp_path.name}")


def test_slices_of_any_length_show_each_object_once_and_in_order(storage: Storage) -> None:
    keys = sorted(f"a/{folder}/{name}" for folder in ("b", "b-c", "b.d", "z") for name in ("1", "10", "2"))
    for key in [*keys, "ab/none", "b/none"]:
        storage.put_bytes(key, b"x")
    for length in (1, 2, 5, len(keys), 100):
        seen, after = list[str](), "a"
        while found := storage.slice("a", after, length):
            assert len(found) <= length
            seen += [key for key, _ in found]
            after = seen[-1]
        assert seen == keys


def test_objects_come_back_and_deletes_are_idempotent(storage: Storage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 100_000  # 25 MB: several parts
    source = tmp_path / "source"
    source.write_bytes(content)
    storage.put_file("a/file", source)
    storage.put_bytes("a/b/small", b"x")
    storage.put_bytes("ab", b"not below a/")
    assert storage.list("a") == [("a/b/small", 1), ("a/file", len(content))]
    written = dict(storage.slice("a", "a", 10))
    assert set(written) == {"a/b/small", "a/file"}
    assert all(abs(written_at - time.time()) < 60 for written_at in written.values())
    storage.get_file("a/file", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    storage.get_folder("a", tmp_path / "folder")
    assert (tmp_path / "folder" / "b" / "small").read_bytes() == b"x"
    for _ in range(2):
        storage.delete("a/file")
        storage.delete_folder("a")
    assert storage.list("a") == []
    assert storage.read("ab") == b"not below a/"
    with pytest.raises(FileNotFoundError):
        storage.chunks("a/file")
    storage.require_reads()


def test_a_stream_that_breaks_leaves_nothing(storage: Storage) -> None:
    async def chunks(broken: bool) -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 1_000_000
        if broken:
            raise ConnectionError("the client went away")

    async def put(key: str, broken: bool) -> None:
        await storage.put_stream(key, chunks(broken))

    anyio.run(put, "whole", False)
    with pytest.raises(Exception, match="the client went away"):
        anyio.run(put, "broken", True)
    assert len(storage.read("whole")) == 20_000_000
    with pytest.raises(FileNotFoundError):
        storage.chunks("broken")


def test_a_folder_streams_as_a_tar_file(storage: Storage) -> None:
    files = {"config.json": b"{}", "sub/weights": b"w" * 1_000_001, "empty": b""}
    for name, content in files.items():
        storage.put_bytes(f"model/{name}", content)
    stream = io.BytesIO(b"".join(tar(folder(storage, "model", UNKNOWN))))
    with tarfile.open(fileobj=stream) as archive:
        members = {name: archive.extractfile(name) for name in archive.getnames()}
        assert {name: file.read() for name, file in members.items() if file is not None} == files


def test_a_reader_may_take_longer_than_a_request(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client downloads at its own pace. The store's deadline is for each piece, not for the whole."""
    monkeypatch.setattr("app.storage.REQUEST_TIMEOUT", "500ms")
    if isinstance(storage.store, S3Store):
        storage = Storage(f"s3://dpo/{storage.store.prefix}")
    content = bytes(range(256)) * 80_000  # 20 MB: five pieces
    storage.put_bytes("slow", content)
    read = []
    for chunk in storage.chunks("slow"):
        read.append(chunk)
        time.sleep(0.6)
    assert b"".join(read) == content


def test_an_object_that_is_replaced_while_it_is_read_is_an_error_and_no_mixture(storage: Storage) -> None:
    storage.put_bytes("replaced", b"1" * 9_000_000)
    chunks = storage.chunks("replaced")
    assert set(next(chunks)) == {ord("1")}
    storage.put_bytes("replaced", b"2" * 9_000_000)
    with pytest.raises(OSError, match="was replaced while it was read"):
        list(chunks)


def test_an_empty_object_has_no_bytes(storage: Storage, tmp_path: Path) -> None:
    storage.put_bytes("empty", b"")
    assert list(storage.chunks("empty")) == [] and storage.read("empty") == b""
    storage.get_file("empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_private_certificate_is_trusted_where_aws_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint of S3 alone, and a bundle of certificates, as AWS's own tools read them from the environment."""
    certificate = make_certificate(tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with s3(certificate) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name.replace("ENDPOINT_URL", "ENDPOINT_URL_S3"), value)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate.authority))
        storage = Storage("s3://dpo")
        storage.put_bytes("key", b"value")
        assert storage.read("key") == b"value"
    assert "SSL_CERT_FILE" not in os.environ, "other connections trust what they did"


def test_an_endpoint_of_s3_alone_may_be_plain_http(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name.replace("ENDPOINT_URL", "ENDPOINT_URL_S3"), value)
    Storage("s3://dpo/alone").require_reads()


def test_the_policy_of_the_docs_allows_what_the_service_does_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but deletes: the server asks for that right on the bucket, while S3 asks for it on the objects."""
    page = ROOT / "docs" / "reference" / "storage.md"
    (policy,) = (block.text for block in blocks(page) if block.markers.get("json") == "policy")
    with s3(open_actions=4) as environment:
        iam = boto3.client(
            "iam", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
            aws_access_key_id="test", aws_secret_access_key="test",
        )  # fmt: skip
        iam.create_user(UserName="service")
        iam.put_user_policy(UserName="service", PolicyName="documents", PolicyDocument=policy)
        key = iam.create_access_key(UserName="service")["AccessKey"]
        iam.close()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        storage = Storage("s3://dpo/service")
        large = b"x" * (2 * WRITE_CHUNK_BYTES + 1)  # in parts
        storage.put_bytes("files/one", large)
        assert storage.read("files/one") == large and storage.size("files/one") == len(large)
        assert [name for name, _ in storage.list("files")] == ["files/one"]
        with pytest.raises(BaseError, match=r"AccessDenied|403"):
            Storage("s3://dpo/other").put_bytes("files/one", b"x")
