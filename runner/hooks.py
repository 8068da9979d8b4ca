"""Library functions beyond `hm_reco.lake` that the runner calls; the command line injects them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hm_reco.lake.storage import Lake


class Hooks(NamedTuple):
    """Library functions that the runner does not import itself."""

    fingerprint: Callable[[str], str]  # of a source outside the lake, by its URI
    build_model_rows: Callable[[Lake], list[dict[str, Any]]]  # the registered models, for the index
