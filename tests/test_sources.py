"""One interface for files, downloads, tables and databases; loads that can be repeated."""

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

from hm_reco.data.contracts import get_columns
from hm_reco.data.ingest_log import read_loads, scan_latest_rows
from hm_reco.data.sources import Source, fingerprint, parse_sources
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.lake.tables import get_table_version, scan, write
from hm_reco.stages.ingestion import ingest

TABLES = {"articles": "articles", "customers": "customers", "transactions": "transactions_train"}


@pytest.fixture(scope="module")
def frames(sample: Path) -> dict[str, pl.DataFrame]:
    """The synthetic data set's tables, as text."""
    return {
        table: pl.read_csv(sample / f"{name}.csv", infer_schema=False)
        for table, name in TABLES.items()
    }


@pytest.fixture
def files(sample: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample, tmp_path / "files"))


def raw(lake: Lake, table: str) -> pl.DataFrame:
    """What lies in the lake, without the marks of its loads, in one order."""
    columns = get_columns(table)
    return scan(lake, f"raw/{table}").select(columns).sort(columns).collect()


@pytest.fixture(scope="module")
def expected(sample: Path, tmp_path_factory) -> dict[str, pl.DataFrame]:
    lake = open_lake(str(tmp_path_factory.mktemp("expected")))
    ingest(lake, str(sample))
    return {table: raw(lake, table) for table in TABLES}


def assert_whole(lake: Lake, expected) -> None:
    for table, frame in expected.items():
        assert raw(lake, table).equals(frame), table


def put(frame: pl.DataFrame, path: Path, kind: str) -> None:
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
def test_a_folder_may_have_any_format(lake, frames, expected, tmp_path, kind):
    (tmp_path / "in").mkdir()
    for table, frame in frames.items():
        put(frame, tmp_path / "in" / f"{table}.{kind}", kind)
    ingest(lake, str(tmp_path / "in"))
    assert_whole(lake, expected)


def test_sources_of_all_kinds_are_mixed(lake, frames, expected, tmp_path, s3):
    """Articles from a Delta table, customers from SQLite, purchases from five places."""
    write(open_lake(str(tmp_path)), "shop/catalogue", frames["articles"])
    with closing(sqlite3.connect(tmp_path / "crm.db")) as database:
        people = frames["customers"].rename({"customer_id": "id"})
        columns = ", ".join(f'"{name}" TEXT' for name in people.columns)
        database.execute(f"CREATE TABLE people ({columns})")
        marks = ", ".join("?" * people.width)
        database.executemany(f"INSERT INTO people VALUES ({marks})", people.rows())
        database.commit()
    rows = frames["transactions"]
    fifth = rows.height // 5
    parts = [rows.slice(i * fifth, fifth if i < 4 else None) for i in range(5)]
    (tmp_path / "drop" / "transactions").mkdir(parents=True)
    put(parts[0], tmp_path / "drop" / "transactions" / "monday.csv.gz", "csv.gz")
    put(parts[1], tmp_path / "drop" / "transactions_tuesday.parquet", "parquet")
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="in/transactions-3.csv", Body=parts[2].write_csv())
    client.put_object(Bucket=bucket, Key="in/other.txt", Body=b"nothing")
    events = parts[3].with_columns(t_dat=pl.col("t_dat") + "T18:30:00Z").rename({"price": "paid"})
    events.write_ndjson(tmp_path / "events.jsonl")
    write(open_lake(s3), "shop/rest", parts[4])
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
    assert_whole(lake, expected)
    again = ingest(lake, sources)
    assert {load.state for load in again} == {"unchanged"} and len(again) == 7


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL server of this test's own; its URL without the password."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory(prefix="hm-postgres-") as folder:
        yield from serve(found[-1].parent, Path(folder), port)


def serve(tools: Path, home: Path, port: int):
    """Run a server in a folder until the tests that use it are through."""
    as_root = os.getuid() == 0  # which PostgreSQL refuses to run as
    user = {"user": "postgres", "group": "postgres"} if as_root else {}
    if as_root:
        shutil.chown(home, "postgres", "postgres")
    (home / "password").write_text("s3cr3t-of-the-test")
    (home / "password").chmod(0o644)
    make = [tools / "initdb", "-D", home / "data", "-U", "reader", "-A", "scram-sha-256"]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c fsync=off"
    options += f" -c unix_socket_directories={home}"
    start = [tools / "pg_ctl", "-D", home / "data", "-w", "-o", options, "-l", home / "log"]

    def call(*command) -> None:  # its output stays away from the server, which would hold it open
        subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL, **user)

    call(*make, f"--pwfile={home}/password")
    call(*start, "start")
    yield f"postgresql+psycopg://reader@127.0.0.1:{port}/postgres"
    call(*start, "-m", "immediate", "stop")


def test_a_postgresql_database_is_a_source(lake, frames, expected, postgres, monkeypatch):
    from sqlalchemy import create_engine, make_url, text

    engine = create_engine(make_url(postgres).set(password="s3cr3t-of-the-test"))
    with engine.begin() as connection:
        for table, frame in frames.items():
            kinds = {"t_dat": "TIMESTAMP", "price": "NUMERIC", "sales_channel_id": "INT"}
            names = ", ".join(f'"{n}" {kinds.get(n, "TEXT")}' for n in frame.columns)
            connection.execute(text(f"CREATE TABLE {table} ({names})"))
            copy = f"COPY {table} FROM STDIN WITH (FORMAT csv, HEADER)"
            with connection.connection.cursor().copy(copy) as stream:
                stream.write(frame.write_csv())
    engine.dispose()
    shop = Source(
        uri=postgres,
        secret="SHOP_PASSWORD",
    )
    with pytest.raises(ValueError, match="environment variable SHOP_PASSWORD"):
        ingest(lake, [shop])
    monkeypatch.setenv("SHOP_PASSWORD", "wrong")
    with pytest.raises(ValueError, match="password authentication failed"):
        ingest(lake, [shop])
    monkeypatch.setenv("SHOP_PASSWORD", "s3cr3t-of-the-test")
    ingest(lake, [shop])
    assert_whole(lake, expected)


@pytest.fixture
def https(files: Path, tmp_path: Path, monkeypatch):
    """A server with a certificate of its own that wants a token; counts the bodies it sends."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    made = made.public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
    made = made.not_valid_after(datetime(2099, 1, 1, tzinfo=UTC))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    pem = tmp_path / "server.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    signed = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem.write_bytes(secret + signed)

    class Handler(http.server.SimpleHTTPRequestHandler):
        sent = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(files), **kwargs)

        def do_GET(self):
            if self.headers.get("Authorization") != "Bearer letmein":
                return self.send_error(401)
            Handler.sent += 1
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


def test_downloads_are_sources(lake, expected, https, monkeypatch):
    url, handler = https
    sources = [Source(uri=f"{url}/{name}.csv", secret="SHOP_TOKEN") for name in TABLES.values()]
    monkeypatch.setenv("SHOP_TOKEN", "guess")
    with pytest.raises(ValueError, match=r"articles\.csv: HTTP Error 401"):
        ingest(lake, sources)
    monkeypatch.setenv("SHOP_TOKEN", "letmein")
    ingest(lake, sources)
    assert_whole(lake, expected)
    assert handler.sent == 3
    assert {load.state for load in ingest(lake, sources)} == {"unchanged"}
    assert handler.sent == 3  # the server said that nothing had changed


def states(loads) -> dict[str, str]:
    return {load.file: load.state for load in loads}


def test_the_same_content_twice_adds_nothing(lake, files, expected):
    ingest(lake, str(files))
    before = get_table_version(lake, "raw/transactions")
    for path in files.iterdir():
        os.utime(path, (0, 0))  # another stamp, the same content
    shutil.copy(files / "transactions_train.csv", files / "transactions_copy.csv")
    loads = ingest(lake, str(files))
    assert states(loads)["transactions_copy.csv"] == "copy"
    assert states(loads)["transactions_train.csv"] == "unchanged"
    assert get_table_version(lake, "raw/transactions") == before
    assert_whole(lake, expected)
    (files / "transactions_train.csv").write_text(
        (files / "transactions_train.csv").read_text().rpartition("\n2020")[0] + "\n"
    )
    loads = ingest(lake, str(files))
    assert set(states(loads).values()) == {"unchanged", "replaced", "loaded"}  # no copy any more
    assert raw(lake, "transactions").height > 1.9 * expected["transactions"].height


def test_a_file_that_becomes_a_copy_keeps_no_rows(lake, files, expected):
    rows = pl.read_csv(files / "transactions_train.csv", infer_schema=False)
    rows.head(30).write_csv(files / "transactions_x.csv")
    ingest(lake, str(files))
    assert raw(lake, "transactions").height == expected["transactions"].height + 30
    shutil.copy(files / "transactions_train.csv", files / "transactions_x.csv")
    assert states(ingest(lake, str(files)))["transactions_x.csv"] == "copy"
    assert_whole(lake, expected)


def test_a_customer_file_that_was_cut_off_stops_the_load(lake, files):
    ingest(lake, str(files), max_quarantined_share=0.05)
    whole = (files / "customers.csv").read_text().splitlines()
    (files / "customers.csv").write_text("\n".join(whole[:1_000]) + "\n")
    with pytest.raises(ValueError, match=r"gone would set aside \d+ of \d+ purchases, more"):
        ingest(lake, str(files), max_quarantined_share=0.05)
    assert len(read_loads(lake)) == 3


def test_other_names_of_columns_are_another_reading(lake, files):
    rows = pl.read_csv(files / "transactions_train.csv", infer_schema=False)
    rows.with_columns(net=pl.lit("0.5")).write_csv(files / "transactions_train.csv")
    gross = Source(uri=str(files))
    ingest(lake, [gross], allow_extra_columns=True)
    net = Source(uri=str(files), columns={"price": "gross", "net": "price"})
    assert (
        states(ingest(lake, [net], allow_extra_columns=True))["transactions_train.csv"]
        == "replaced"
    )
    assert set(raw(lake, "transactions")["price"]) == {0.5}


def test_a_copy_in_another_format_is_no_second_purchase(lake, files, frames, expected):
    ingest(lake, str(files))
    frames["transactions"].write_parquet(files / "transactions.parquet")
    with pytest.raises(ValueError, match=r"\.parquet: a copy of transactions_train\.csv"):
        ingest(lake, str(files))
    assert_whole(lake, expected)


def test_a_corrected_file_replaces_its_own_rows_only(lake, files, expected):
    whole = pl.read_csv(files / "transactions_train.csv", infer_schema=False)
    (files / "transactions_train.csv").unlink()
    for name, rows in (("a", whole.head(100)), ("b", whole.slice(100))):
        rows.write_csv(files / f"transactions_{name}.csv")
    ingest(lake, str(files))
    assert_whole(lake, expected)
    whole.head(60).write_csv(files / "transactions_a.csv")
    assert states(ingest(lake, str(files)))["transactions_a.csv"] == "replaced"
    assert raw(lake, "transactions").height == whole.height - 40
    (files / "transactions_b.csv").unlink()  # tidied up, not taken back
    ingest(lake, str(files))
    assert raw(lake, "transactions").height == whole.height - 40


def test_a_source_that_is_not_declared_any_more_is_withdrawn(lake, files, expected, tmp_path):
    more = Path(shutil.copytree(files, tmp_path / "more"))
    extra = pl.read_csv(more / "transactions_train.csv", infer_schema=False).head(10)
    extra.write_csv(more / "transactions_train.csv")
    both = [Source(uri=str(files)), Source(uri=str(more), name="more")]
    ingest(lake, both)
    assert raw(lake, "transactions").height == expected["transactions"].height + 10
    loads = ingest(lake, both[:1])
    assert {x.state for x in loads if x.source == "more"} == {"removed"}
    assert_whole(lake, expected)
    moved = files.rename(tmp_path / "moved")
    ingest(lake, str(moved))  # the same content from another place is no copy of what goes
    assert_whole(lake, expected)


def test_purchases_wait_for_their_customers_and_articles(lake, files, expected):
    customers = pl.read_csv(files / "customers.csv", infer_schema=False)
    customers.head(1_500).write_csv(files / "customers.csv")
    ingest(lake, str(files))
    waiting = scan(lake, "quarantine/transactions").collect()
    assert set(waiting["rule"]) == {"customer_id unknown"} and waiting.height > 0
    customers.slice(1_500).write_csv(files / "customers_new.csv")
    ingest(lake, str(files))
    assert_whole(lake, expected)
    assert scan(lake, "quarantine/transactions").collect().is_empty()
    customers.slice(1_501).write_csv(files / "customers_new.csv")  # one of them is taken back
    gone = customers["customer_id"][1_500]
    ingest(lake, str(files))
    aside = scan(lake, "quarantine/transactions").collect()
    assert set(aside["customer_id"]) <= {gone} and set(aside["file"]) <= {"transactions_train.csv"}
    rest = expected["transactions"].filter(pl.col("customer_id") != gone)
    assert raw(lake, "transactions").equals(rest)
    assert aside.height == expected["transactions"].height - rest.height
    customers.slice(1_500).write_csv(files / "customers_new.csv")  # and comes back
    ingest(lake, str(files))
    assert_whole(lake, expected)


def test_the_newest_row_of_a_customer_counts(lake, files):
    customers = pl.read_csv(files / "customers.csv", infer_schema=False)
    ingest(lake, str(files))
    older = customers.head(1).with_columns(age=pl.lit("99"))
    older.write_csv(files / "customers_late.csv")
    ingest(lake, str(files))
    key = customers["customer_id"][0]
    now = scan_latest_rows(lake, "customers").filter(customer_id=key).collect()
    assert (
        now["age"].to_list() == [99]
        and scan_latest_rows(lake, "customers").collect().height == 2_000
    )


def test_a_failed_load_says_which_file_and_changes_no_other(lake, files, expected):
    ingest(lake, str(files))
    (files / "transactions_w40.csv").write_bytes("t_dat,kund\nå,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"files: transactions_w40\.csv: .*(utf-8|missing)"):
        ingest(lake, str(files))
    assert_whole(lake, expected)
    assert len(read_loads(lake)) == 3


def test_only_the_sources_asked_for_are_read(lake, files, tmp_path):
    more = Path(shutil.copytree(files, tmp_path / "more"))
    (more / "articles.csv").unlink()
    (more / "customers.csv").unlink()
    both = [Source(uri=str(files), name="base"), Source(uri=str(more), name="more")]
    ingest(lake, both)
    loads = ingest(lake, both, only_sources=["more"])
    assert {load.source for load in loads} == {"more"}
    with pytest.raises(ValueError, match="no source 'mroe'; declared are base, more"):
        ingest(lake, both, only_sources=["mroe"])


def test_a_changed_source_is_remarked(lake, files):
    ingest(lake, str(files))
    frame = pl.read_csv(files / "customers.csv", infer_schema=False)
    frame.select(reversed(frame.columns)).write_csv(files / "customers.csv")
    articles = pl.read_csv(files / "articles.csv", infer_schema=False)
    articles.with_columns(season=pl.lit("AW")).write_csv(files / "articles.csv")
    loads = {x.file: x for x in ingest(lake, str(files), allow_extra_columns=True)}
    assert "columns in another order" in loads["customers.csv"].notes
    assert "season: none → String" in loads["articles.csv"].notes


def test_a_password_in_a_declaration_is_refused_and_not_shown():
    places = ["postgresql://me:hunter2@db/shop"]  # pragma: allowlist secret
    places.append("https://me:hunter2@shop/x.csv")  # pragma: allowlist secret
    for place in places:
        with pytest.raises(ValueError, match="named by `secret`") as err:
            parse_sources([{"uri": place}])
        assert "hunter2" not in str(err.value)
    with pytest.raises(ValueError, match="declared twice"):
        parse_sources([{"uri": "x"}, {"uri": "x"}])
    with pytest.raises(ValueError, match=r"source number 1: .*zone"):
        parse_sources([{"uri": "x", "schedule": "0 5 * * *", "zone": "Europe/Stockhome"}])


def test_a_fingerprint_changes_with_an_object(s3):
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="in/articles.csv", Body=b"a")
    before = fingerprint(f"{s3}/in")
    assert before == fingerprint(f"{s3}/in")
    client.put_object(Bucket=bucket, Key="in/articles.csv", Body=b"b")
    assert before != fingerprint(f"{s3}/in")
    assert fingerprint(f"{s3}/nothing") != fingerprint(f"{s3}/nothing")
