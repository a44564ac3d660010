"""Repeated augmentation: several views of an image in an epoch of as many batches."""

from __future__ import annotations

import pytest

from vitrim.data.loader import ResumableBatchSampler


def epoch_of(repeats: int, *, world: int = 1, epoch: int = 1) -> list[tuple[int, int]]:
    """Return what all processes see in an epoch of 24 images in batches of 4."""
    seen = []
    for rank in range(world):
        batches = ResumableBatchSampler(
            24, batch_size=4, seed=7, shuffle=True, rank=rank, world=world
        )
        batches.repeats = repeats
        batches.set_epoch(epoch)
        given = [key for batch in batches for key in batch]
        assert len(given) == 4 * len(batches) == 24 // world
        seen += given
    return seen


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_view_of_an_image_is_drawn_by_itself(world: int) -> None:
    seen = epoch_of(3, world=world)
    assert len({*seen}) == 24
    views: dict[int, set[int]] = {}
    for epoch, index in seen:
        views.setdefault(index, set()).add(epoch)
    assert len(views) == 8
    assert all(len(each) == 3 for each in views.values())


def test_the_first_view_is_that_of_an_epoch_without_repeats() -> None:
    plain, repeated = epoch_of(1), epoch_of(3)
    assert {epoch for epoch, _ in plain} == {1}
    assert repeated[::3] == plain[:8]
    assert {*epoch_of(3, epoch=2)}.isdisjoint(repeated)
