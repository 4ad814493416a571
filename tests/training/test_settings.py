"""Settings are checked at construction, and the schedule follows them."""

import dataclasses
import itertools

import pytest

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.training.settings import TrainingSettings, learning_rate_at


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 2.0),
        ("steps", True),
        ("window", -1),
        ("batch_size", "2"),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("final_rate", 1.5),
        ("clip_norm", 0.0),
        ("weight_decay", -0.1),
        ("autocast", "fp16"),
        ("device", "tpu"),
        ("seed", -1),
        ("seed", 2**32),
        ("threads", 0),
        ("checkpoint_every", 0),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=name):
        TrainingSettings(**{name: value})  # type: ignore[arg-type]


def test_settings_go_to_a_dict_and_back() -> None:
    settings = TrainingSettings(steps=3, autocast="bf16")
    assert TrainingSettings.from_dict(dataclasses.asdict(settings)) == settings
    for bad in ({}, {**dataclasses.asdict(settings), "more": 1}, [1], None):
        with pytest.raises(InvalidInput, match="exactly"):
            TrainingSettings.from_dict(bad)


def test_the_schedule_warms_up_and_falls_to_its_last_share() -> None:
    settings = TrainingSettings(steps=200, warmup_steps=20, learning_rate=2.0, final_rate=0.1)
    rates = [learning_rate_at(step, settings) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(2.0) == rates[20]
    assert rates[-1] == pytest.approx(0.2)
    assert all(a < b for a, b in itertools.pairwise(rates[:20]))
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))


def test_a_schedule_of_warm_up_alone_is_finite() -> None:
    settings = TrainingSettings(steps=3, warmup_steps=0)
    assert [learning_rate_at(step, settings) > 0 for step in range(5)] == [True] * 5
    assert learning_rate_at(0, dataclasses.replace(settings, steps=1)) > 0
