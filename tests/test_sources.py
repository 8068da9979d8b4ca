"""One interface for files, downloads, tables and databases; idempotent loads."""

import gzip
import http.server
import os
import shutil
import socket
import sqlite3
import ssl
import subprocess
import threading
import zipfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import polars as pl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hm_reco.data import sources as data_sources
from hm_reco.data.contracts import get_columns
from hm_reco.data.ingest_log import read_loads, scan_latest_rows
from hm_reco.data.ingestion import ingest
from hm_reco.data.sources import (
    SOURCE_KINDS,
    Source,
    SourceFile,
    SourceKind,
    discover_parts,
    fingerprint,
    parse_sources,
)
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.lake.tables import get_table_version, scan, write

TABLES = {"articles": "articles", "customers": "customers", "transactions": "transactions_train"}


@pytest.fixture(scope="module")
def frames(synthetic_files: Path) -> dict[str, pl.DataFrame]:
    """The synthetic data set's tables, as text."""
    return {
        table: pl.read_csv(synthetic_files / f"{name}.csv", infer_schema=False)
        for table, name in TABLES.items()
    }


@pytest.fixture
def files(synthetic_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(synthetic_files, tmp_path / "files"))


def read_raw(lake: Lake, table: str) -> pl.DataFrame:
    """A raw table without the columns of its loads, sorted."""
    columns = get_columns(table)
    return scan(lake, f"raw/{table}").select(columns).sort(columns).collect()


@pytest.fixture(scope="module")
def expected(synthetic_files: Path, tmp_path_factory) -> dict[str, pl.DataFrame]:
    lake = open_lake(str(tmp_path_factory.mktemp("expected")))
    ingest(lake, str(synthetic_files))
    return {table: read_raw(lake, table) for table in TABLES}


def assert_raw_equal(lake: Lake, expected) -> None:
    for table, frame in expected.items():
        assert read_raw(lake, table).equals(frame), table


def write_table(frame: pl.DataFrame, path: Path, kind: str) -> None:
    """Write a table as text in one of the formats."""
    if kind == "parquet":
        return frame.write_parquet(path)
    if kind == "jsonl":
        return frame.write_ndjson(path)
    if kind == "csv.zst":
        return frame.write_csv(path, compression="zstd", check_extension=False)
    text = frame.write_csv().encode()
    if kind == "csv.zip":
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr(path.name.removesuffix(".zip"), text)
    else:
        path.write_bytes(gzip.compress(text, 1) if kind == "csv.gz" else text)
    return None


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "csv.zst", "csv.zip", "parquet", "jsonl"])
def test_folder_source_reads_any_format(lake, frames, expected, tmp_path, kind):
    (tmp_path / "in").mkdir()
    for table, frame in frames.items():
        write_table(frame, tmp_path / "in" / f"{table}.{kind}", kind)
    ingest(lake, str(tmp_path / "in"))
    assert_raw_equal(lake, expected)


def test_mixed_source_kinds_load_all_rows(lake, frames, expected, tmp_path, s3):
    """Articles from a Delta table, customers from SQLite, purchases from five places."""
    write(open_lake(str(tmp_path)), "shop/catalogue", frames["articles"])
    with closing(sqlite3.connect(tmp_path / "crm.db")) as database:
        customers = frames["customers"].rename({"customer_id": "id"})
        columns = ", ".join(f'"{name}" TEXT' for name in customers.columns)
        database.execute(f"CREATE TABLE people ({columns})")
        placeholders = ", ".join("?" * customers.width)
        database.executemany(f"INSERT INTO people VALUES ({placeholders})", customers.rows())
        database.commit()
    rows = frames["transactions"]
    fifth = rows.height // 5
    subsets = [rows.slice(i * fifth, fifth if i < 4 else None) for i in range(5)]
    (tmp_path / "drop" / "transactions").mkdir(parents=True)
    write_table(subsets[0], tmp_path / "drop" / "transactions" / "monday.csv.gz", "csv.gz")
    write_table(subsets[1], tmp_path / "drop" / "transactions_tuesday.parquet", "parquet")
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="in/transactions-3.csv", Body=subsets[2].write_csv())
    client.put_object(Bucket=bucket, Key="in/other.txt", Body=b"nothing")
    events = subsets[3].with_columns(t_dat=pl.col("t_dat") + "T18:30:00Z").rename({"price": "paid"})
    events.write_ndjson(tmp_path / "events.jsonl")
    write(open_lake(s3), "shop/rest", subsets[4])
    sources = parse_sources(
        [
            {"uri": f"{tmp_path}/shop/catalogue", "table": "articles"},
            {
                "name": "crm",
                "uri": f"sqlite:///{tmp_path}/crm.db",
                "queries": {"customers": "SELECT * FROM people"},
                "columns": {"id": "customer_id"},
            },
            {"uri": f"{tmp_path}/drop"},
            {"uri": f"{s3}/in"},
            {
                "uri": f"{tmp_path}/events.jsonl",
                "table": "transactions",
                "columns": {"paid": "price"},
            },
            {"uri": f"{s3}/shop/rest", "table": "transactions"},
        ]
    )
    ingest(lake, sources)
    assert_raw_equal(lake, expected)
    second_loads = ingest(lake, sources)
    assert {load.state for load in second_loads} == {"unchanged"} and len(second_loads) == 7


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL server for this module; its URL without the password."""
    initdb_paths = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not initdb_paths:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory(prefix="hm-postgres-") as folder:
        yield from run_postgres(initdb_paths[-1].parent, Path(folder), port)


def run_postgres(tools: Path, folder: Path, port: int):
    """Run a server in a folder until the tests that use it have ended."""
    as_root = os.getuid() == 0  # PostgreSQL refuses to run as root
    account = {"user": "postgres", "group": "postgres"} if as_root else {}
    if as_root:
        shutil.chown(folder, "postgres", "postgres")
    (folder / "password").write_text("s3cr3t-of-the-test")
    (folder / "password").chmod(0o644)
    initdb = [tools / "initdb", "-D", folder / "data", "-U", "reader", "-A", "scram-sha-256"]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c fsync=off"
    options += f" -c unix_socket_directories={folder}"
    pg_ctl = [tools / "pg_ctl", "-D", folder / "data", "-w", "-o", options, "-l", folder / "log"]

    def run_tool(*command) -> None:  # no pipe: the server would keep it open
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, **account)

    run_tool(*initdb, f"--pwfile={folder}/password")
    run_tool(*pg_ctl, "start")
    yield f"postgresql+psycopg://reader@127.0.0.1:{port}/postgres"
    run_tool(*pg_ctl, "-m", "immediate", "stop")


def test_postgresql_source_needs_valid_password(lake, frames, expected, postgres, monkeypatch):
    from sqlalchemy import create_engine, make_url, text

    engine = create_engine(make_url(postgres).set(password="s3cr3t-of-the-test"))
    with engine.begin() as connection:
        for table, frame in frames.items():
            sql_types = {"t_dat": "TIMESTAMP", "price": "NUMERIC", "sales_channel_id": "INT"}
            names = ", ".join(f'"{n}" {sql_types.get(n, "TEXT")}' for n in frame.columns)
            connection.execute(text(f"CREATE TABLE {table} ({names})"))
            copy = f"COPY {table} FROM STDIN WITH (FORMAT csv, HEADER)"
            with connection.connection.cursor().copy(copy) as stream:
                stream.write(frame.write_csv())
    engine.dispose()
    source = Source(
        uri=postgres,
        secret="SHOP_PASSWORD",
    )
    with pytest.raises(ValueError, match="environment variable SHOP_PASSWORD"):
        ingest(lake, [source])
    monkeypatch.setenv("SHOP_PASSWORD", "wrong")
    with pytest.raises(ValueError, match="password authentication failed"):
        ingest(lake, [source])
    monkeypatch.setenv("SHOP_PASSWORD", "s3cr3t-of-the-test")
    ingest(lake, [source])
    assert_raw_equal(lake, expected)


@pytest.fixture
def https(files: Path, tmp_path: Path, monkeypatch):
    """A server with a self-signed certificate and a token; counts the files it sends."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    certificate = certificate.public_key(key.public_key()).serial_number(1)
    certificate = certificate.not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
    certificate = certificate.not_valid_after(datetime(2099, 1, 1, tzinfo=UTC))
    certificate = certificate.add_extension(
        x509.SubjectAlternativeName([x509.DNSName("localhost")]), False
    )
    pem = tmp_path / "server.pem"
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate_pem = certificate.sign(key, hashes.SHA256()).public_bytes(
        serialization.Encoding.PEM
    )
    pem.write_bytes(key_pem + certificate_pem)

    class Handler(http.server.SimpleHTTPRequestHandler):
        n_sent = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(files), **kwargs)

        def do_GET(self):
            if self.headers.get("Authorization") != "Bearer letmein":
                return self.send_error(401)
            Handler.n_sent += 1
            return super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    yield f"https://localhost:{server.server_port}", Handler
    server.shutdown()


def test_added_source_kind_is_found_before_others(files, monkeypatch):
    def list_feed(source: Source) -> list[SourceFile]:
        path = files / "articles.csv"
        return [SourceFile("articles", "version 7", lambda folder: shutil.copy(path, folder))]

    feed = SourceKind("feed", lambda s: s.uri.startswith("feed://"), list_feed, has_suffixes=False)
    monkeypatch.setattr(data_sources, "SOURCE_KINDS", (feed, *SOURCE_KINDS))
    [part] = discover_parts(Source(uri="feed://shop"))
    assert (part.table, part.file.etag) == ("articles", "version 7")
    assert fingerprint("feed://shop") == fingerprint("feed://shop")
    assert len(discover_parts(Source(uri=str(files)))) == 3


def test_https_source_with_token_downloads_once(lake, expected, https, monkeypatch):
    url, handler = https
    sources = [Source(uri=f"{url}/{name}.csv", secret="SHOP_TOKEN") for name in TABLES.values()]
    monkeypatch.setenv("SHOP_TOKEN", "guess")
    with pytest.raises(ValueError, match=r"articles\.csv: HTTP Error 401"):
        ingest(lake, sources)
    monkeypatch.setenv("SHOP_TOKEN", "letmein")
    ingest(lake, sources)
    assert_raw_equal(lake, expected)
    assert handler.n_sent == 3
    assert {load.state for load in ingest(lake, sources)} == {"unchanged"}
    assert handler.n_sent == 3  # the server reported no change


def get_state_by_file(loads) -> dict[str, str]:
    return {load.file: load.state for load in loads}


def test_unchanged_and_copied_files_add_no_rows(lake, files, expected):
    ingest(lake, str(files))
    before = get_table_version(lake, "raw/transactions")
    for path in files.iterdir():
        os.utime(path, (0, 0))  # another etag, the same content
    shutil.copy(files / "transactions_train.csv", files / "transactions_copy.csv")
    loads = ingest(lake, str(files))
    assert get_state_by_file(loads)["transactions_copy.csv"] == "copy"
    assert get_state_by_file(loads)["transactions_train.csv"] == "unchanged"
    assert get_table_version(lake, "raw/transactions") == before
    assert_raw_equal(lake, expected)
    (files / "transactions_train.csv").write_text(
        (files / "transactions_train.csv").read_text().rpartition("\n2020")[0] + "\n"
    )
    loads = ingest(lake, str(files))
    assert set(get_state_by_file(loads).values()) == {
        "unchanged",
        "replaced",
        "loaded",
    }  # no longer a copy
    assert read_raw(lake, "transactions").height > 1.9 * expected["transactions"].height


def test_file_that_becomes_copy_loses_its_rows(lake, files, expected):
    rows = pl.read_csv(files / "transactions_train.csv", infer_schema=False)
    rows.head(30).write_csv(files / "transactions_x.csv")
    ingest(lake, str(files))
    assert read_raw(lake, "transactions").height == expected["transactions"].height + 30
    shutil.copy(files / "transactions_train.csv", files / "transactions_x.csv")
    assert get_state_by_file(ingest(lake, str(files)))["transactions_x.csv"] == "copy"
    assert_raw_equal(lake, expected)


def test_truncated_customer_file_stops_load(lake, files):
    ingest(lake, str(files), max_quarantined_share=0.05)
    lines = (files / "customers.csv").read_text().splitlines()
    (files / "customers.csv").write_text("\n".join(lines[:1_000]) + "\n")
    with pytest.raises(ValueError, match=r"customers would quarantine \d+ of \d+ purchases, more"):
        ingest(lake, str(files), max_quarantined_share=0.05)
    assert len(read_loads(lake)) == 3


def test_changed_column_mapping_replaces_rows(lake, files):
    rows = pl.read_csv(files / "transactions_train.csv", infer_schema=False)
    rows.with_columns(net=pl.lit("0.5")).write_csv(files / "transactions_train.csv")
    gross_source = Source(uri=str(files))
    ingest(lake, [gross_source], allow_extra_columns=True)
    net_source = Source(uri=str(files), columns={"price": "gross", "net": "price"})
    assert (
        get_state_by_file(ingest(lake, [net_source], allow_extra_columns=True))[
            "transactions_train.csv"
        ]
        == "replaced"
    )
    assert set(read_raw(lake, "transactions")["price"]) == {0.5}


def test_copy_in_another_format_is_rejected(lake, files, frames, expected):
    ingest(lake, str(files))
    frames["transactions"].write_parquet(files / "transactions.parquet")
    with pytest.raises(
        ValueError, match=r"\.parquet: looks like a copy of transactions_train\.csv"
    ):
        ingest(lake, str(files))
    assert_raw_equal(lake, expected)


def test_corrected_file_replaces_own_rows_only(lake, files, expected):
    transactions = pl.read_csv(files / "transactions_train.csv", infer_schema=False)
    (files / "transactions_train.csv").unlink()
    for name, rows in (("a", transactions.head(100)), ("b", transactions.slice(100))):
        rows.write_csv(files / f"transactions_{name}.csv")
    ingest(lake, str(files))
    assert_raw_equal(lake, expected)
    transactions.head(60).write_csv(files / "transactions_a.csv")
    assert get_state_by_file(ingest(lake, str(files)))["transactions_a.csv"] == "replaced"
    assert read_raw(lake, "transactions").height == transactions.height - 40
    (files / "transactions_b.csv").unlink()  # a deleted file keeps its rows
    ingest(lake, str(files))
    assert read_raw(lake, "transactions").height == transactions.height - 40


def test_undeclared_source_is_removed(lake, files, expected, tmp_path):
    second_folder = Path(shutil.copytree(files, tmp_path / "more"))
    extra = pl.read_csv(second_folder / "transactions_train.csv", infer_schema=False).head(10)
    extra.write_csv(second_folder / "transactions_train.csv")
    sources = [Source(uri=str(files)), Source(uri=str(second_folder), name="more")]
    ingest(lake, sources)
    assert read_raw(lake, "transactions").height == expected["transactions"].height + 10
    loads = ingest(lake, sources[:1])
    assert {x.state for x in loads if x.source == "more"} == {"removed"}
    assert_raw_equal(lake, expected)
    moved_folder = files.rename(tmp_path / "moved")
    ingest(
        lake, str(moved_folder)
    )  # the same content from another folder is no copy of a removed source
    assert_raw_equal(lake, expected)


def test_orphans_are_quarantined_until_keys_arrive(lake, files, expected):
    customers = pl.read_csv(files / "customers.csv", infer_schema=False)
    customers.head(1_500).write_csv(files / "customers.csv")
    ingest(lake, str(files))
    orphans = scan(lake, "quarantine/transactions").collect()
    assert set(orphans["rule"]) == {"customer_id unknown"} and orphans.height > 0
    customers.slice(1_500).write_csv(files / "customers_new.csv")
    ingest(lake, str(files))
    assert_raw_equal(lake, expected)
    assert scan(lake, "quarantine/transactions").collect().is_empty()
    customers.slice(1_501).write_csv(files / "customers_new.csv")  # remove one customer
    removed_customer = customers["customer_id"][1_500]
    ingest(lake, str(files))
    quarantined = scan(lake, "quarantine/transactions").collect()
    assert set(quarantined["customer_id"]) <= {removed_customer} and set(quarantined["file"]) <= {
        "transactions_train.csv"
    }
    remaining = expected["transactions"].filter(pl.col("customer_id") != removed_customer)
    assert read_raw(lake, "transactions").equals(remaining)
    assert quarantined.height == expected["transactions"].height - remaining.height
    customers.slice(1_500).write_csv(files / "customers_new.csv")  # and add it again
    ingest(lake, str(files))
    assert_raw_equal(lake, expected)


def test_latest_rows_returns_last_loaded_customer(lake, files):
    customers = pl.read_csv(files / "customers.csv", infer_schema=False)
    ingest(lake, str(files))
    late_row = customers.head(1).with_columns(age=pl.lit("99"))
    late_row.write_csv(files / "customers_late.csv")
    ingest(lake, str(files))
    customer_id = customers["customer_id"][0]
    customer_row = scan_latest_rows(lake, "customers").filter(customer_id=customer_id).collect()
    assert (
        customer_row["age"].to_list() == [99]
        and scan_latest_rows(lake, "customers").collect().height == 2_000
    )


def test_failed_load_names_file_and_changes_nothing(lake, files, expected):
    ingest(lake, str(files))
    (files / "transactions_w40.csv").write_bytes("t_dat,kund\nå,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"files: transactions_w40\.csv: .*(utf-8|missing)"):
        ingest(lake, str(files))
    assert_raw_equal(lake, expected)
    assert len(read_loads(lake)) == 3


def test_ingest_reads_selected_sources_only(lake, files, tmp_path):
    second_folder = Path(shutil.copytree(files, tmp_path / "more"))
    (second_folder / "articles.csv").unlink()
    (second_folder / "customers.csv").unlink()
    sources = [Source(uri=str(files), name="base"), Source(uri=str(second_folder), name="more")]
    ingest(lake, sources)
    loads = ingest(lake, sources, only_sources=["more"])
    assert {load.source for load in loads} == {"more"}
    with pytest.raises(ValueError, match="no source 'mroe'; declared are base, more"):
        ingest(lake, sources, only_sources=["mroe"])


def test_schema_change_of_source_is_noted(lake, files):
    ingest(lake, str(files))
    frame = pl.read_csv(files / "customers.csv", infer_schema=False)
    frame.select(reversed(frame.columns)).write_csv(files / "customers.csv")
    articles = pl.read_csv(files / "articles.csv", infer_schema=False)
    articles.with_columns(season=pl.lit("AW")).write_csv(files / "articles.csv")
    loads = {x.file: x for x in ingest(lake, str(files), allow_extra_columns=True)}
    assert "columns in another order" in loads["customers.csv"].notes
    assert "season: none → String" in loads["articles.csv"].notes


def test_password_in_source_uri_is_rejected_and_not_shown():
    uris = ["postgresql://me:hunter2@db/shop"]  # pragma: allowlist secret
    uris.append("https://me:hunter2@shop/x.csv")  # pragma: allowlist secret
    for uri in uris:
        with pytest.raises(ValueError, match="environment variable in `secret`") as error:
            parse_sources([{"uri": uri}])
        assert "hunter2" not in str(error.value)
    with pytest.raises(ValueError, match="declared twice"):
        parse_sources([{"uri": "x"}, {"uri": "x"}])
    with pytest.raises(ValueError, match=r"source number 1: .*zone"):
        parse_sources([{"uri": "x", "schedule": "0 5 * * *", "zone": "Europe/Stockhome"}])


def test_fingerprint_changes_with_s3_object(s3):
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="in/articles.csv", Body=b"a")
    before = fingerprint(f"{s3}/in")
    assert before == fingerprint(f"{s3}/in")
    client.put_object(Bucket=bucket, Key="in/articles.csv", Body=b"b")
    assert before != fingerprint(f"{s3}/in")
    assert fingerprint(f"{s3}/nothing") != fingerprint(f"{s3}/nothing")
