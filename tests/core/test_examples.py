"""Examples in the docstrings of the data classes that cross stages are right."""

import pytest

from grpo_ds.core.losses import LossTerms
from grpo_ds.core.objective import Objective
from grpo_ds.core.packing import PackedRows, RowContents
from grpo_ds.core.surrogates import Surrogate
from grpo_ds.core.tally import Tally
from tests.conftest import check_example


@pytest.mark.parametrize("cls", [LossTerms, Objective, PackedRows, RowContents, Surrogate, Tally])
def test_the_example_of_a_data_class_is_right(cls):
    check_example(cls)
