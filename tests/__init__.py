"""Tests that cross notebooks; failing assertions of the helpers are explained too."""

import pytest

pytest.register_assert_rewrite("tests.fault_injection", "tests.toy_pipeline")
