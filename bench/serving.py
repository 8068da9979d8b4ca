"""Throughput and latency of the service, compared with a bare FastAPI echo.

    python bench/serving.py                        the synthetic data set, 20,000 customers
    python bench/serving.py --lake LAKE            a lake whose stages have run, of any size
    python bench/serving.py --soak 10              minutes under load, ten switches of the model

Needs `wrk`. Everything is measured in one run on this machine, on which wrk runs, too: compare the
ratios to the echo. `live` requests 20 articles, more than are precomputed, so candidates,
features and ranks are computed for each request; `ready` requests 12, from the snapshot.
p99 is printed at full load and at 70 % of the live load, with pauses between requests.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
from fastapi import FastAPI
from pydantic_core import to_json

from hm_reco.api.model_manager import find_target, load_model
from hm_reco.api.responses import respond
from hm_reco.api.schemas import PredictRequest
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.lake.tables import scan
from hm_reco.ranking.features import compute_features
from hm_reco.ranking.ranker import rank
from hm_reco.registry.bundle import load_bundle, save_bundle
from hm_reco.registry.registry import (
    get_champion,
    load_scores,
    publish_immediately,
    read_models,
    register_model,
    save_scores,
)
from hm_reco.retrieval.candidates import generate_candidates

echo = FastAPI()


@echo.post("/predict")
async def echo_request(request: PredictRequest) -> PredictRequest:
    """Return the request."""
    return request


class LoadResult(NamedTuple):
    """Figures of one run of wrk."""

    rate: float  # requests a second
    p50: float  # ms
    p95: float
    p99: float
    errors: int


WRK_SCRIPT = """
local bodies, n = {}, 0
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local headers = { ["Content-Type"] = "application/json" }
function init(args) math.randomseed(os.time()); n = math.random(#bodies) end
function request()
  n = n %% #bodies + 1
  return wrk.format("POST", "/predict", headers, bodies[n])
end
function delay() return %s end
function done(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format("RESULT %%f %%f %%f %%f %%d\\n",
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1000,
    latency:percentile(95) / 1000, latency:percentile(99) / 1000, failed))
end
"""


def run_wrk(
    port: int, bodies: list[Any], seconds: int, connections: int = 8, pause: float = 0.0
) -> LoadResult:
    """Send bodies, on some connections, with random pauses (ms, mean) between requests."""
    with TemporaryDirectory(prefix="hm-wrk-") as folder:
        body_file, script = Path(folder) / "bodies", Path(folder) / "script.lua"
        body_file.write_text("\n".join(json.dumps(body) for body in bodies))
        delay = f"-math.log(1 - math.random()) * {pause:f}" if pause else "0"
        script.write_text(WRK_SCRIPT % (body_file, delay))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
        url = f"http://127.0.0.1:{port}"
        output = subprocess.run(
            [*command, "-s", str(script), url], check=True, capture_output=True, text=True
        ).stdout
    match = re.search(r"RESULT (\S+) (\S+) (\S+) (\S+) (\d+)", output)
    assert match, output
    *figures, errors = match.groups()
    return LoadResult(*map(float, figures), int(errors))


@contextmanager
def start_server(*command: str, port: int, **environment: str) -> Iterator[psutil.Process]:
    """A server on a port of this machine."""
    with subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/openapi.json", timeout=1)
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def find_free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_lake(folder: str, customers: int) -> Lake:
    """A synthetic data set with a trained model and its snapshot."""
    hm_command = str(Path(sys.executable).with_name("hm"))
    lake = f"{folder}/lake"
    quick_parameters = (
        "-p",
        "evaluation_weeks=1",
        "-p",
        "training_weeks=2",
        "-p",
        "tuning_weeks=1",
    )
    source = ("--data", f"{folder}/source")
    subprocess.run(
        [hm_command, "generate", "--customers", str(customers), "--out", source[1]], check=True
    )
    subprocess.run(
        [hm_command, "run", "--lake", lake, *source, *quick_parameters],
        check=True,
        capture_output=True,
    )
    return open_lake(lake)


def build_requests(lake: Lake, count: int = 2_000) -> dict[str, list[dict[str, Any]]]:
    """Bodies of each kind of request, for random customers."""
    customers = scan(lake, "processed/customers").select("customer_id").collect()["customer_id"]
    ids = customers.sample(min(count, len(customers)), seed=0).to_list()
    articles = scan(lake, "predictions/cold_start").collect()["article_id"].to_list()
    rng = random.Random(0)
    live = [{"customer_ids": [id_], "k": 20} for id_ in ids]
    return {
        "known, live": live,
        "cold, live": [{"customer_ids": [f"unknown-{n}"], "k": 20} for n in range(count)],
        "session of 3": [body | {"recent_articles": rng.sample(articles, 3)} for body in live],
        "filtered": [
            body | {"filters": {"colours": ["Black", "White"], "exclude_articles": articles[:3]}}
            for body in live
        ],
        "known, ready": [{"customer_ids": [id_], "k": 12} for id_ in ids],
        "100, live": [{"customer_ids": rng.sample(ids, 100), "k": 20} for _ in range(50)],
        "100, ready": [{"customer_ids": rng.sample(ids, 100), "k": 12} for _ in range(50)],
    }


def measure_median_ms(function: Callable[[int], Any], n_calls: int = 300) -> float:
    """Median time of `function(i)` over the calls, in one thread."""
    seconds = []
    for n in range(n_calls):
        started = time.perf_counter()
        function(n)
        seconds.append(time.perf_counter() - started)
    return 1_000 * statistics.median(seconds[n_calls // 10 :])


def print_profile(lake: Lake, total_ms: float) -> None:
    """Print the parts of the time of a request for one customer; `total_ms` is with HTTP."""
    model = load_model(lake, find_target(lake))
    recommender, bundle = model.recommender, model.recommender.bundle
    rows = np.random.default_rng(0).permutation(len(recommender.customers.customer) - 1)[:300, None]
    ids = [recommender.customer_ids.text[row[0]].decode() for row in rows]
    requests = [PredictRequest(customer_ids=[id_], k=20) for id_ in ids]
    index, customers, budget = recommender.index, recommender.customers, bundle.budget
    candidates = [generate_candidates(index, customers, budget, row) for row in rows]
    matrices = [compute_features(index, customers, item) for item in candidates]
    responses = [respond(model, item, "bench") for item in requests]
    popular = index.tables.top_overall.indices
    trees_ms = measure_median_ms(lambda n: bundle.ranker.predict(matrices[n].values))
    parts = {
        "candidates": measure_median_ms(
            lambda n: generate_candidates(index, customers, budget, rows[n])
        ),
        "features": measure_median_ms(lambda n: compute_features(index, customers, candidates[n])),
        "trees": trees_ms,
        "list": measure_median_ms(lambda n: rank(bundle.ranker, matrices[n], 20, popular))
        - trees_ms,
    }
    parts["ids, words"] = measure_median_ms(lambda n: respond(model, requests[n], "x")) - sum(
        parts.values()
    )
    parts["JSON"] = measure_median_ms(lambda n: to_json(responses[n]))
    parts["HTTP, checks, threads"] = total_ms - sum(parts.values())
    mean_candidates = np.mean([len(item.article) for item in candidates])
    print(
        f"\nA request for one customer: {total_ms:.2f} ms, {mean_candidates:.0f} candidates, "
        f"{bundle.ranker.describe() if bundle.ranker else bundle.method}"
    )
    for name, ms in parts.items():
        print(f"  {name:<26}{ms:>7.3f} ms{ms / total_ms:>6.0%}")


def register_twin(lake: Lake) -> tuple[str, str]:
    """Register a copy of the champion under another version; returns both versions."""
    champion = get_champion(lake)
    save_bundle(lake, replace(load_bundle(lake, champion), version="twin"))
    save_scores(lake, "twin", load_scores(lake, champion))
    champion_model = next(model for model in read_models(lake) if model.version == champion)
    changes = {"version": "twin", "event": "candidate", "created": datetime.now(UTC)}
    with publish_immediately(lake):
        register_model(lake, replace(champion_model, **changes))
    hm_command = str(Path(sys.executable).with_name("hm"))
    command = [hm_command, "run", "inference", "--lake", lake.root, "-p", "version=twin"]
    subprocess.run(command, check=True, capture_output=True)
    return champion, "twin"


def print_load(name: str, load: LoadResult, echo_rate: float) -> None:
    """Print a line."""
    print(
        f"{name:<28}{load.rate:>9,.0f}{load.p50:>9.2f}{load.p95:>9.2f}{load.p99:>9.2f}"
        f"{load.errors:>8}{load.rate / echo_rate:>9.2f}",
        flush=True,
    )


def run_bench(lake: Lake, seconds: int) -> None:
    """Print the table."""
    bodies, port, echo_port = build_requests(lake), find_free_port(), find_free_port()
    print(f"{'':<28}{'req/s':>9}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'errors':>8}{'x echo':>9}")
    uvicorn = (sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent))
    command = (*uvicorn, "serving:echo", "--port", str(echo_port), "--no-access-log")
    with start_server(*command, port=echo_port):
        run_wrk(echo_port, bodies["known, ready"], 2)
        echo_load = run_wrk(echo_port, bodies["known, ready"], seconds)
        print_load("bare FastAPI echo", echo_load, echo_load.rate)
    hm_command = str(Path(sys.executable).with_name("hm"))
    started = time.monotonic()
    environment = {"HM_LOG_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    with start_server(
        hm_command, "serve", "--lake", lake.root, "--port", str(port), port=port, **environment
    ) as process:
        start_seconds = time.monotonic() - started
        loads = {}
        for name, requests in bodies.items():
            run_wrk(port, requests, 2)
            loads[name] = run_wrk(port, requests, seconds, 2 if "100" in name else 8)
            print_load(name, loads[name], echo_load.rate)
        single_connection = run_wrk(port, bodies["known, live"], seconds, 1)
        pause = (
            8e3 / (0.7 * loads["known, live"].rate) - 1.5 * single_connection.p50
        )  # minus the response time
        partial_load = run_wrk(port, bodies["known, live"], seconds, 8, pause)
        print_load(
            f"known, live, {partial_load.rate / loads['known, live'].rate:.0%} load",
            partial_load,
            echo_load.rate,
        )
        ratios = {
            kind: run_wrk(port, bodies[f"100, {kind}"], seconds, 1).p50
            / run_wrk(port, bodies[f"known, {kind}"], seconds, 1).p50
            for kind in ("live", "ready")
        }
        memory = process.memory_full_info()
    print_profile(lake, single_connection.p50)
    formatted = ", ".join(f"{ratio:.1f} x {kind}" for kind, ratio in ratios.items())
    print(f"\n100 customers at once take as long as one: {formatted}")
    unique_gb, total_gb = memory.uss / 1e9, memory.rss / 1e9
    print(
        f"up after {start_seconds:.1f} s; {unique_gb:.2f} GB unique, "
        f"{total_gb:.2f} GB with mapped files"
    )


def run_soak(lake: Lake, minutes: float, switches: int = 10) -> None:
    """Run at about 70 % of the maximal load, with one model switch per interval."""
    hm_command, port = str(Path(sys.executable).with_name("hm")), find_free_port()
    versions, bodies = register_twin(lake), build_requests(lake)["known, live"]
    environment = {
        "HM_LOG_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
        "HM_REGISTRY_POLL_SECONDS": "1",
    }
    command = (hm_command, "serve", "--lake", lake.root, "--port", str(port))
    print(f"{'':<28}{'req/s':>9}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'errors':>8}{'own MB':>9}")
    with start_server(*command, port=port, **environment) as process:
        full_load, single_connection = run_wrk(port, bodies, 10), run_wrk(port, bodies, 5, 1)
        pause = 8e3 / (0.7 * full_load.rate) - 1.5 * single_connection.p50
        for i in range(switches):
            target = versions[(i + 1) % 2]
            step = ["rollback"] if i % 2 else ["promote", target, "--force"]
            switch_command = [hm_command, *step, "--lake", lake.root]
            with subprocess.Popen(switch_command, stdout=subprocess.DEVNULL):
                load = run_wrk(port, bodies, round(60 * minutes / switches), 8, pause)
            served = httpx.get(f"http://127.0.0.1:{port}/healthz").json()["model_version"]
            unique_mb = process.memory_full_info().uss / 1e6
            print(
                f"{step[0]:<28}{load.rate:>9,.0f}{load.p50:>9.2f}{load.p95:>9.2f}{load.p99:>9.2f}"
                f"{load.errors:>8}{unique_mb:>9,.0f}",
                flush=True,
            )
            assert served == target, f"{served} serves, not {target}"


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--lake", help="a lake whose stages have run; default: a synthetic data set"
    )
    parser.add_argument(
        "--customers", type=int, default=20_000, help="size of the synthetic data set"
    )
    parser.add_argument("--soak", type=float, help="minutes under load")
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="hm-serving-") as folder:
        lake = open_lake(options.lake) if options.lake else prepare_lake(folder, options.customers)
        if options.soak:
            run_soak(lake, options.soak)
        else:
            run_bench(lake, options.seconds)


if __name__ == "__main__":
    main()
