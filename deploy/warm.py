"""While an image is built: all stages once on a small shop, then some questions.

What numba compiles on the way stays in the image, so that the first run and the first request need
not wait for it; and an image in which something is missing is not built at all.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from hm_reco.core.lake import open_lake
from hm_reco.core.registry import RANKER, read_models
from hm_reco.service.answers import respond, similar
from hm_reco.service.contract import PredictRequest, SimilarRequest
from hm_reco.service.switch import load, with_state

SMALL = ("customers=600", "training.evaluation_weeks=1", "training.training_weeks=2")


def main() -> None:
    """Run and ask."""
    with TemporaryDirectory() as folder:
        given = [part for one in SMALL for part in ("-p", one)]
        hm = str(Path(sys.executable).with_name("hm"))
        subprocess.run([hm, "run", "--lake", folder, *given], check=True)
        lake = open_lake(folder)
        ranker = next(model.version for model in read_models(lake) if model.method == RANKER)
        served = load(lake, with_state(lake, ranker))  # whoever is champion of so small a shop
        first = respond(served, PredictRequest(customer_ids=["a", "b"]), "warm")
        article = first["recommendations"][0]["articles"][0]["article_id"]
        asked = {"customer_ids": ["a"], "recent_articles": [article], "explain": True}
        asked["filters"] = {"exclude_articles": [article], "in_stock": True}
        respond(served, PredictRequest.model_validate(asked), "warm")
        similar(served, SimilarRequest(article_id=article), "warm")


if __name__ == "__main__":
    main()
