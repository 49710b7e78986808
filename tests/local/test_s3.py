"""S3 as a source and as a store, on a server that speaks its protocol over HTTP."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.fs
import pytest

import pipelines.storage
from pipelines.data.infer import infer_schema
from pipelines.data.read import Counts, Reader
from pipelines.data.source import Source
from pipelines.errors import DataError, SpecError
from pipelines.prepare import prepare
from pipelines.spec import DataSpec
from pipelines.storage import Folder
from tests.local.test_pipeline import people, spec_of
from tests.servers import S3, cutting_proxy, s3
from tests.unit.test_formats import blocks_of

SOON_S = 60  # a store that is gone is told within this time


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


def upload(server: S3, local: Path, bucket: str) -> None:
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(server.uri(bucket, allow_bucket_creation="true"))
    filesystem.create_dir(bucket)
    pyarrow.fs.copy_files(str(local), f"{bucket}/data", destination_filesystem=filesystem)


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        people()[2000 * i : 2000 * (i + 1)].write_parquet(folder / f"{i}.parquet")
    return folder


@pytest.mark.usefixtures("session")
def test_source_and_store_on_s3_give_what_local_ones_give(server: S3, tmp_path: Path) -> None:
    local = folder_of(tmp_path)
    upload(server, local, "people")
    store = server.uri("people/store")
    expected = prepare(spec_of(local, tmp_path / "store", data={"key": []}))

    spec = spec_of(local, tmp_path, data={"key": [], "source": server.uri("people/data")}, store=store)
    found = prepare(spec)

    assert found.rows == expected.rows and found.schema == expected.schema
    assert found.preprocessor.to_json() == expected.preprocessor.to_json()
    assert found.path.startswith("s3://people/store/cache/") and Folder.at(found.path).exists("manifest.json")
    assert prepare(spec).reused


def test_globs_and_columns_reach_the_server(server: S3, tmp_path: Path) -> None:
    upload(server, folder_of(tmp_path), "globs")
    assert len(Source.open(DataSpec(source=server.uri("globs/data/[01].parquet"))).files) == 2
    _, one, _ = blocks_of(DataSpec(source=server.uri("globs/data")), {"id"}, None)
    _, everything, _ = blocks_of(DataSpec(source=server.uri("globs/data")), None, None)
    assert one.rows == everything.rows == 6000 and one.bytes < 0.5 * everything.bytes


def test_a_missing_bucket_is_one_sentence(server: S3) -> None:
    with pytest.raises(DataError, match="data.source: 's3://nobody/data.*' does not exist; check the bucket and path"):
        Source.open(DataSpec(source=server.uri("nobody/data")))


def test_wrong_credentials_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3(tmp_path, unchecked=3) as server:
        right = user_of(server)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", right[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", right[1])
        upload(server, folder_of(tmp_path), "guarded")
        assert len(Source.open(DataSpec(source=server.uri("guarded/data"))).files) == 3

        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-one")
        with pytest.raises(DataError, match="data.source: 's3://guarded/data.*' cannot be listed: .*credentials") as caught:
            Source.open(DataSpec(source=server.uri("guarded/data")))

    assert "\n" not in str(caught.value) and "wrong-one" not in str(caught.value)


def user_of(server: S3) -> tuple[str, str]:
    """Make a user that may do everything, and return the key and secret."""
    scope = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/iam/aws4_request, SignedHeaders=host, Signature=0"
    }

    def ask(**form: str) -> str:
        answer = httpx.post(
            f"http://127.0.0.1:{server.port}/", data={"Version": "2010-05-08", "UserName": "u", **form}, headers=scope
        )
        assert answer.status_code == 200, answer.text
        return answer.text

    everything = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
    ask(Action="CreateUser")
    ask(Action="PutUserPolicy", PolicyName="all", PolicyDocument=everything)
    text = ask(Action="CreateAccessKey")
    key, secret = (re.search(f"<{tag}>(.*?)</{tag}>", text) for tag in ("AccessKeyId", "SecretAccessKey"))
    assert key and secret
    return key[1], secret[1]


def large(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    frame = pl.DataFrame({f"c{i}": np.random.default_rng(i).random(200_000) for i in range(4)})
    frame.write_parquet(folder / "a.parquet", row_group_size=20_000)
    return folder


def test_a_connection_that_is_cut_while_rows_come_is_one_sentence_soon(server: S3, tmp_path: Path) -> None:
    upload(server, large(tmp_path), "proxied")
    with cutting_proxy(server.port) as proxy:
        data = DataSpec(source=S3(proxy.port, server.process).uri("proxied/data"))
        source = Source.open(data)
        reader = Reader.of(source, infer_schema(source, data), data, {"c1"}, None)
        assert sum(block.table.num_rows for block in reader.blocks(source.units[0], Counts())) == 200_000
        proxy.left = 400_000  # of 1.6 MB
        started = time.monotonic()
        with pytest.raises(
            DataError, match=r"proxied/data/a\.parquet: cannot be read: .*; check the file and the conn"
        ) as caught:
            list(reader.blocks(source.units[0], Counts()))
    assert "\n" not in str(caught.value) and time.monotonic() - started < SOON_S


def test_a_server_that_ends_in_the_middle_is_one_sentence_soon(tmp_path: Path) -> None:
    with s3(tmp_path) as server:
        upload(server, large(tmp_path), "cut")
        data = DataSpec(source=server.uri("cut/data"))
        source = Source.open(data)
        reader = Reader.of(source, infer_schema(source, data), data, {"c1"}, None)
        server.end()
        started = time.monotonic()
        with pytest.raises(DataError, match=r"cut/data/a\.parquet: cannot be read: .*onnect") as caught:
            list(reader.blocks(source.units[0], Counts()))
        with pytest.raises(DataError, match="data.source: 's3://cut/data.*' cannot be listed: .*onnect"):
            Source.open(data)
        with pytest.raises(DataError, match="'s3://cut/store.*' cannot be reached: .*onnect"):
            Folder.at(server.uri("cut/store")).exists("manifest.json")
        assert "\n" not in str(caught.value) and time.monotonic() - started < SOON_S


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://me:hunter2@bucket/data", "the s3:// URI holds a password.*AWS_SECRET_ACCESS_KEY"),
        ("s3://me:hunter2@[bucket/data", "a s3:// URI is none: Invalid IPv6 URL; expected scheme://host/path"),
        ("abc://bucket/data", "'abc://bucket/data' cannot be opened: Unrecognized filesystem type"),
        ("s3://bucket/data?colour=red", "cannot be opened: Unexpected query parameter in S3 URI"),
        ("hdfs://127.0.0.1:1/x", "'hdfs://127.0.0.1:1/x' cannot be "),
    ],
)
def test_uris_that_do_not_work_are_one_sentence(uri: str, message: str) -> None:
    with pytest.raises((DataError, SpecError), match=message) as caught:
        Source.open(DataSpec(source=uri))
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "handed"),
    [
        ("gs://bucket/data", "gs://bucket/data?retry_limit_seconds=30"),  # by itself it tries for a quarter of an hour
        ("gs://bucket/data?retry_limit_seconds=7", "gs://bucket/data?retry_limit_seconds=7"),
        ("abfs://c@account.dfs.core.windows.net/data", "abfs://c@account.dfs.core.windows.net/data"),
        ("hdfs://host:8020/data", "hdfs://host:8020/data"),
    ],
)
def test_other_uris_are_handed_to_arrow_as_they_are(uri: str, handed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_uri(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
        asked.append(location)
        return pyarrow.fs.LocalFileSystem(), "bucket/data/"

    arrow = SimpleNamespace(fs=SimpleNamespace(FileSystem=SimpleNamespace(from_uri=from_uri)), ArrowException=pa.ArrowException)
    monkeypatch.setattr(pipelines.storage, "pa", arrow)

    assert pipelines.storage.open_location(uri)[1] == "bucket/data" and asked == [handed]
