"""The learning rate of each step is the one that transformers' schedule of the same name has."""

import pytest

from tests.training.layouts import make_engine, rollout_of, take_step

# of 1e-3, worked out by hand: five updates, a warm-up of two, then down to 0 over the other three
LINEAR = {"lr_scheduler_type": "linear", "warmup_steps": 2}, [0, 1 / 2, 1, 2 / 3, 1 / 3]
RATES = [
    LINEAR,
    ({"lr_scheduler_type": "linear"}, [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),  # no step is lost to a warm-up
    ({"lr_scheduler_type": "cosine"}, [1, 0.904508, 0.654508, 0.345492, 0.095492]),  # (1 + cos(pi k / 5)) / 2
    ({"lr_scheduler_type": "constant", "warmup_steps": 2}, [0, 1 / 2, 1, 1, 1]),
]


def rates_of(engine, steps):
    rates = []
    for _ in range(steps):
        rates.append(engine.learning_rate * 1e3)
        take_step(engine, rollout_of())
    return rates


@pytest.mark.parametrize(("flags", "rates"), RATES, ids=str)
def test_the_rate_of_each_step(tiny_folder, tmp_path, flags, rates):
    engine = make_engine(tiny_folder, tmp_path, "offload", flags=flags)
    assert rates_of(engine, 5) == pytest.approx(rates, abs=1e-6)
    engine.close()


@pytest.mark.parametrize("layout", ["offload, bf16 masters", "on the card", "stage 0"])
def test_a_schedule_in_other_layouts_after_a_rehearsal_and_from_a_checkpoint(tiny_folder, tmp_path, layout):
    flags, rates = LINEAR
    engine = make_engine(tiny_folder, tmp_path, layout, flags=flags)
    engine.rehearse(rows for rows, _ in rollout_of().micro_batches())
    assert rates_of(engine, 3) == pytest.approx(rates[:3], abs=1e-6)
    engine.save_checkpoint(tmp_path, "now")
    engine.close()
    resumed = make_engine(tiny_folder, tmp_path, layout, flags=flags)
    resumed.load_checkpoint(tmp_path, "now")
    assert rates_of(resumed, 2) == pytest.approx(rates[3:], abs=1e-6)
    resumed.close()
