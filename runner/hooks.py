"""What the runner asks of the library beyond the lake; the command line hands it over."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hm_reco.lake.storage import Lake


class Hooks(NamedTuple):
    """Functions of the library that are no matter of a lake alone."""

    fingerprint: Callable[[str], str]  # of a source outside of the lake, by its URI
    build_model_rows: Callable[[Lake], list[dict[str, Any]]]  # the registered models, for the index
