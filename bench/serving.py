"""How many requests the service answers, and how soon, beside a bare FastAPI echo.

    python bench/serving.py                        the synthetic data set, 20,000 customers
    python bench/serving.py --lake LAKE            a lake whose stages have run, of any size
    python bench/serving.py --soak 10              minutes under load, ten switches of the model

Needs `wrk`. Everything is measured in one run on this machine, wrk beside the service: look at the
ratios to the echo. `live` asks for 20 articles, more than were computed at night, so candidates,
features and ranks are computed for each request; `ready` asks for the 12 that lie in the state.
p99 is given at full load and at 70 % of the live load, which pauses between requests bring about.
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
from hm_reco.ranking.forest import predict_scores
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
async def repeat(asked: PredictRequest) -> PredictRequest:
    """Answer what was asked."""
    return asked


class Load(NamedTuple):
    """What wrk saw."""

    rate: float  # requests a second
    p50: float  # ms
    p95: float
    p99: float
    errors: int


SCRIPT = """
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


def wrk(
    port: int, bodies: list[Any], seconds: int, connections: int = 8, pause: float = 0.0
) -> Load:
    """Send bodies, on some connections, with random pauses (ms, mean) between requests."""
    with TemporaryDirectory(prefix="hm-wrk-") as folder:
        lines, script = Path(folder) / "bodies", Path(folder) / "script.lua"
        lines.write_text("\n".join(json.dumps(body) for body in bodies))
        wait = f"-math.log(1 - math.random()) * {pause:f}" if pause else "0"
        script.write_text(SCRIPT % (lines, wait))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
        url = f"http://127.0.0.1:{port}"
        out = subprocess.run(
            [*command, "-s", str(script), url], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"RESULT (\S+) (\S+) (\S+) (\S+) (\d+)", out)
    assert found, out
    *numbers, errors = found.groups()
    return Load(*map(float, numbers), int(errors))


@contextmanager
def serving(*command: str, port: int, **environment: str) -> Iterator[psutil.Process]:
    """A server on a port of this machine."""
    with subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL) as it:
        try:
            deadline = time.monotonic() + 300
            while it.poll() is None and time.monotonic() < deadline:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/openapi.json", timeout=1)
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield psutil.Process(it.pid)
        finally:
            it.send_signal(signal.SIGTERM)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def prepare(folder: str, customers: int) -> Lake:
    """A synthetic data set with a trained model and its state."""
    hm = str(Path(sys.executable).with_name("hm"))
    lake = f"{folder}/lake"
    few = ("-p", "evaluation_weeks=1", "-p", "training_weeks=2", "-p", "tuning_weeks=1")
    source = ("--data", f"{folder}/source")
    subprocess.run([hm, "generate", "--customers", str(customers), "--out", source[1]], check=True)
    subprocess.run([hm, "run", "--lake", lake, *source, *few], check=True, capture_output=True)
    return open_lake(lake)


def requests_of(lake: Lake, count: int = 2_000) -> dict[str, list[dict[str, Any]]]:
    """Bodies of each kind of request, about customers who bought in the last weeks."""
    customers = scan(lake, "processed/customers").select("customer_id").collect()["customer_id"]
    ids = customers.sample(min(count, len(customers)), seed=0).to_list()
    articles = scan(lake, "predictions/cold_start").collect()["article_id"].to_list()
    draw = random.Random(0)
    live = [{"customer_ids": [id_], "k": 20} for id_ in ids]
    return {
        "known, live": live,
        "cold, live": [{"customer_ids": [f"stranger-{n}"], "k": 20} for n in range(count)],
        "session of 3": [one | {"recent_articles": draw.sample(articles, 3)} for one in live],
        "filtered": [
            one | {"filters": {"colours": ["Black", "White"], "exclude_articles": articles[:3]}}
            for one in live
        ],
        "known, ready": [{"customer_ids": [id_], "k": 12} for id_ in ids],
        "100, live": [{"customer_ids": draw.sample(ids, 100), "k": 20} for _ in range(50)],
        "100, ready": [{"customer_ids": draw.sample(ids, 100), "k": 12} for _ in range(50)],
    }


def median_ms(function: Callable[[int], Any], times: int = 300) -> float:
    """Of a function of the number of its call, in one thread."""
    seconds = []
    for n in range(times):
        begun = time.perf_counter()
        function(n)
        seconds.append(time.perf_counter() - begun)
    return 1_000 * statistics.median(seconds[times // 10 :])


def profile(lake: Lake, whole: float) -> None:
    """Print where the time of a request for one customer goes; `whole` ms with HTTP."""
    now = load_model(lake, find_target(lake))
    recommender, bundle = now.recommender, now.recommender.bundle
    rows = np.random.default_rng(0).permutation(len(recommender.customers.customer) - 1)[:300, None]
    ids = [recommender.customer_ids.text[row[0]].decode() for row in rows]
    asked = [PredictRequest(customer_ids=[id_], k=20) for id_ in ids]
    shop, people, budget = recommender.index, recommender.customers, bundle.budget
    found = [generate_candidates(shop, people, budget, row) for row in rows]
    matrices = [compute_features(shop, people, one) for one in found]
    given = [respond(now, one, "bench") for one in asked]
    best = shop.top_overall.indices
    trees = median_ms(lambda n: predict_scores(bundle.forest, matrices[n].values))
    parts = {
        "candidates": median_ms(lambda n: generate_candidates(shop, people, budget, rows[n])),
        "features": median_ms(lambda n: compute_features(shop, people, found[n])),
        "trees": trees,
        "list": median_ms(lambda n: rank(bundle.forest, matrices[n], 20, best)) - trees,
    }
    parts["ids, words"] = median_ms(lambda n: respond(now, asked[n], "x")) - sum(parts.values())
    parts["JSON"] = median_ms(lambda n: to_json(given[n]))
    parts["HTTP, checks, threads"] = whole - sum(parts.values())
    count = np.mean([len(one.article) for one in found])
    print(
        f"\nA request for one customer: {whole:.2f} ms, {count:.0f} candidates, "
        f"{bundle.booster.num_trees() if bundle.booster else 0} trees"
    )
    for name, ms in parts.items():
        print(f"  {name:<26}{ms:>7.3f} ms{ms / whole:>6.0%}")


def second_model(lake: Lake) -> tuple[str, str]:
    """The champion, and the same once more under another version."""
    now = get_champion(lake)
    save_bundle(lake, replace(load_bundle(lake, now), version="twin"))
    save_scores(lake, "twin", load_scores(lake, now))
    made = next(model for model in read_models(lake) if model.version == now)
    twin = {"version": "twin", "event": "candidate", "created": datetime.now(UTC)}
    with publish_immediately(lake):
        register_model(lake, replace(made, **twin))
    hm = str(Path(sys.executable).with_name("hm"))
    state = [hm, "run", "inference", "--lake", lake.root, "-p", "version=twin"]
    subprocess.run(state, check=True, capture_output=True)
    return now, "twin"


def show(name: str, load: Load, beside: float) -> None:
    """Print a line."""
    print(
        f"{name:<28}{load.rate:>9,.0f}{load.p50:>9.2f}{load.p95:>9.2f}{load.p99:>9.2f}"
        f"{load.errors:>8}{load.rate / beside:>9.2f}",
        flush=True,
    )


def measure(lake: Lake, seconds: int) -> None:
    """Print the table."""
    bodies, port, echo_port = requests_of(lake), free_port(), free_port()
    print(f"{'':<28}{'req/s':>9}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'errors':>8}{'x echo':>9}")
    uvicorn = (sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent))
    command = (*uvicorn, "serving:echo", "--port", str(echo_port), "--no-access-log")
    with serving(*command, port=echo_port):
        wrk(echo_port, bodies["known, ready"], 2)
        bare = wrk(echo_port, bodies["known, ready"], seconds)
        show("bare FastAPI echo", bare, bare.rate)
    hm = str(Path(sys.executable).with_name("hm"))
    begun = time.monotonic()
    quiet = {"HM_LOG_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    with serving(hm, "serve", "--lake", lake.root, "--port", str(port), port=port, **quiet) as it:
        loaded = time.monotonic() - begun
        loads = {}
        for name, asked in bodies.items():
            wrk(port, asked, 2)
            loads[name] = wrk(port, asked, seconds, 2 if "100" in name else 8)
            show(name, loads[name], bare.rate)
        one = wrk(port, bodies["known, live"], seconds, 1)
        pause = 8e3 / (0.7 * loads["known, live"].rate) - 1.5 * one.p50  # it answers in between
        calm = wrk(port, bodies["known, live"], seconds, 8, pause)
        show(f"known, live, {calm.rate / loads['known, live'].rate:.0%} load", calm, bare.rate)
        ratios = {
            kind: wrk(port, bodies[f"100, {kind}"], seconds, 1).p50
            / wrk(port, bodies[f"known, {kind}"], seconds, 1).p50
            for kind in ("live", "ready")
        }
        memory = it.memory_full_info()
    profile(lake, one.p50)
    told = ", ".join(f"{ratio:.1f} x {kind}" for kind, ratio in ratios.items())
    print(f"\n100 customers at once take as long as one: {told}")
    own, whole = memory.uss / 1e9, memory.rss / 1e9
    print(f"up after {loaded:.1f} s; {own:.2f} GB of its own, {whole:.2f} GB with what is mapped")


def soak(lake: Lake, minutes: float, switches: int = 10) -> None:
    """About 70 % of the load that it can bear, a switch in each part of the time."""
    hm, port = str(Path(sys.executable).with_name("hm")), free_port()
    versions, bodies = second_model(lake), requests_of(lake)["known, live"]
    environment = {
        "HM_LOG_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
        "HM_REGISTRY_POLL_SECONDS": "1",
    }
    start = (hm, "serve", "--lake", lake.root, "--port", str(port))
    print(f"{'':<28}{'req/s':>9}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'errors':>8}{'own MB':>9}")
    with serving(*start, port=port, **environment) as it:
        full, one = wrk(port, bodies, 10), wrk(port, bodies, 5, 1)
        pause = 8e3 / (0.7 * full.rate) - 1.5 * one.p50
        for turn in range(switches):
            wanted = versions[(turn + 1) % 2]
            step = ["rollback"] if turn % 2 else ["promote", wanted, "--force"]
            command = [hm, *step, "--lake", lake.root]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL):
                load = wrk(port, bodies, round(60 * minutes / switches), 8, pause)
            serves = httpx.get(f"http://127.0.0.1:{port}/healthz").json()["model_version"]
            own = it.memory_full_info().uss / 1e6
            print(
                f"{step[0]:<28}{load.rate:>9,.0f}{load.p50:>9.2f}{load.p95:>9.2f}{load.p99:>9.2f}"
                f"{load.errors:>8}{own:>9,.0f}",
                flush=True,
            )
            assert serves == wanted, f"{serves} serves, not {wanted}"


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
    asked = parser.parse_args()
    with TemporaryDirectory(prefix="hm-serving-") as folder:
        lake = open_lake(asked.lake) if asked.lake else prepare(folder, asked.customers)
        if asked.soak:
            soak(lake, asked.soak)
        else:
            measure(lake, asked.seconds)


if __name__ == "__main__":
    main()
