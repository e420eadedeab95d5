"""Training images: their order and augmentation depend on the seed and the position alone."""

import itertools
import multiprocessing
import os
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from projects.stageinteractor.data import build_train_loader
from projects.stageinteractor.data.randomness import keep_random_states, seed_random

WIDE, TALL = {"width": 3, "height": 2}, {"width": 2, "height": 3}


def mapper(record):
    """The image's number, and what an augmentation would draw from each generator."""
    import random

    return {"number": record["number"], "image": torch.rand(2),
            "draws": (random.random(), np.random.rand(), np.random.rand(3).tolist())}


def make_loader(shapes=(WIDE,) * 7, batch=2, mapper=mapper, **options):
    records = [{"number": i, "file_name": f"{i}.png", **shape} for i, shape in enumerate(shapes)]
    options = {"seed": 3, **options}
    return build_train_loader(records, mapper=mapper, total_batch_size=batch, **options)


def take(loader, count):
    return list(itertools.islice(loader, count))


def numbers(batches):
    return [[image["number"] for image in batch] for batch in batches]


def comparable(batches):
    return [[(i["number"], i["draws"], i["image"].tolist()) for i in batch] for batch in batches]


def test_every_epoch_has_each_image_once_in_another_order():
    drawn = list(itertools.chain(*numbers(take(make_loader(), 7))))
    first, second = drawn[:7], drawn[7:]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second and first != sorted(first)


def test_the_seed_decides():
    assert numbers(take(make_loader(), 7)) == numbers(take(make_loader(), 7))
    assert numbers(take(make_loader(), 7)) != numbers(take(make_loader(seed=4), 7))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(workers):
    alone = comparable(take(make_loader(), 9))
    assert alone == comparable(take(make_loader(num_workers=workers), 9))
    draws = [str(image[1:]) for batch in alone for image in batch]
    assert len(set(draws)) == len(draws)  # nor does one image draw what another draws


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 11])
def test_a_resumed_loader_goes_on_where_the_other_was(done, workers):
    """With wide and tall images that wait for their like, and workers that load ahead."""
    shapes = (WIDE, TALL, WIDE, WIDE, TALL, WIDE, TALL)
    loader = make_loader(shapes, num_workers=workers)
    batches = iter(loader)
    before = list(itertools.islice(batches, done))
    state = loader.state_dict()
    rest = list(itertools.islice(batches, 5))
    other = make_loader(shapes, seed=99, num_workers=workers)
    other.load_state_dict(state)
    assert comparable(take(other, 5)) == comparable(rest)
    assert state["images"] == 2 * len(before)


def test_a_batch_is_all_wide_or_all_tall():
    shapes = (WIDE, TALL, WIDE, TALL, {"width": 3, "height": 3})  # square counts as tall
    for batch in numbers(take(make_loader(shapes, batch=3), 20)):
        assert len({number in (0, 2) for number in batch}) == 1
    mixed = numbers(take(make_loader(shapes, batch=3, aspect_ratio_grouping=False), 20))
    assert any(len({number in (0, 2) for number in batch}) == 2 for batch in mixed)


def as_process(monkeypatch, rank, processes):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(processes, monkeypatch):
    """Images of one size: the same images a step, each drawn as in a single process."""
    alone = comparable(take(make_loader(batch=6), 8))
    shares = []
    for rank in range(processes):
        as_process(monkeypatch, rank, processes)
        shares.append(comparable(take(make_loader(batch=6), 8)))
    assert [sum(step, []) for step in zip(*shares)] == alone


def test_another_batch_size_goes_on_with_the_next_images():
    loader = make_loader(batch=2)
    seen = take(loader, 4)
    larger = make_loader(batch=4)
    larger.load_state_dict(loader.state_dict())
    drawn = sum(numbers(seen) + numbers(take(larger, 5)), [])
    assert Counter(drawn) == dict.fromkeys(range(7), 4)  # 28 draws: four epochs
    assert drawn == sum(numbers(take(make_loader(batch=7), 4)), [])


def test_loading_leaves_no_trace_in_the_random_numbers_of_a_step():
    seed_random(1)
    expected = torch.rand(3), np.random.rand(3)
    seed_random(1)
    take(make_loader(), 3)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


def test_numbers_that_follow_the_seed_make_it_another_one():
    drawn = set()
    for numbers_ in ((1,), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2,), (2**31, 5), (5, 2**31)):
        with keep_random_states():
            seed_random(*numbers_)
            drawn.add((torch.rand(1).item(), np.random.rand()))
    assert len(drawn) == 7


def test_state_is_plain_and_small(tmp_path):
    loader = make_loader()
    take(loader, 3)
    torch.save(loader.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    assert state == {"seed": 3, "images": 6, "num_images": 7}


def test_a_mapper_may_leave_out_an_image():
    """It returns nothing, as Detectron2's may."""
    def without_odd(record):
        return mapper(record) if record["number"] % 2 == 0 else None

    loader = make_loader(mapper=without_odd)
    drawn = sum(numbers(take(loader, 7)), [])
    assert {number % 2 for number in drawn} == {0} and not loader.unreadable
    with pytest.raises(ValueError, match="10 images in a row"):
        take(make_loader(mapper=lambda record: None), 1)


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
def test_workers_are_out_of_reach_of_signals_to_the_group_of_the_main_process():
    batches = iter(make_loader(num_workers=2))
    next(batches), next(batches)  # one of each, which has then started
    workers = multiprocessing.active_children()
    assert workers and all(os.getpgid(worker.pid) == worker.pid for worker in workers)
    batches.close()
