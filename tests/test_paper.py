"""Published rows: what is in the package, and which run is which row."""

import pytest

from vitrim.paper import of_run, published
from vitrim.run import CONF


def record(experiment: str | None, method: str, model: str, strength: float) -> dict[str, object]:
    return {
        "choices.experiment": experiment,
        "choices.method": method,
        "choices.model": model,
        "strength": strength,
    }


def test_every_row_says_where_it_was_read_and_whether_that_was_checked() -> None:
    rows = published()
    assert len(rows) == 236
    assert all(row.source for row in rows)
    doubtful = [row for row in rows if any(w in row.source for w in ("memory", "second-hand"))]
    assert doubtful
    assert not any(row.verified for row in doubtful)


def test_rows_name_experiments_that_exist() -> None:
    names = {row.experiment for row in published()} - {""}
    assert {"aiminify/vit_base", "vtp/imagenet"} <= names
    assert all((CONF / "experiment" / f"{name}.yaml").is_file() for name in names)


@pytest.mark.parametrize("experiment", ["aiminify/deit_base", None])
def test_a_run_finds_its_row_by_experiment_or_by_method_and_model(experiment: str | None) -> None:
    row = of_run(record(experiment, "aiminify", "deit_base", 3.0))
    assert row is not None
    assert (row.params, row.flops, row.top1) == (67_218_363, 27_508_995_072, 76.23)
    assert of_run(record(experiment, "aiminify", "deit_base", 2.0)) is None
    assert of_run(record(None, "oneshot", "deit_base", 3.0)) is None


def test_macs_are_half_of_the_flops() -> None:
    row = of_run(record("vtp/imagenet", "vtp", "deit_base", 4.0))
    assert row is not None
    assert (row.params, row.flops, row.top1) == (48_000_000, 20_000_000_000, 80.7)
