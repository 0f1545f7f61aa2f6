"""Batch n is a pure function of (seed, n, source): for any number of processes, any start, any memory."""

import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.loader import Loader, iterate_in_turn
from jaxdiff.data.sources import ArraySource, open_source


def make_source(count: int = 37, height: int = 6, width: int = 9, channels: int = 3) -> ArraySource:
    """Random images; the label of image i is i."""
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)
    return ArraySource("random", images, np.arange(count), tuple(map(str, range(count))), "nowhere")


class Captioned:
    """Images of various sizes with captions; counts how often it is asked."""

    num_classes, class_names, channels, image_shape, has_text = 0, (), 3, None, True

    def __init__(self, count: int = 23):
        rng = np.random.default_rng(0)
        self.images = [rng.integers(0, 256, (6 + i % 3, 6 + i % 5, 3), np.uint8) for i in range(count)]
        self.asked: list[int] = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked.append(index)
        return {"image": self.images[index], "label": 0, "text": f"caption {index}"}

    def describe(self):
        return "captioned"


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


OPTIONS = {"image_size": 6, "channels": 3, "crop": "random", "flip": True}


def test_a_batch_has_the_promised_arrays():
    batch = Loader(make_source(), 8, 0, image_size=5, channels=1)[0]
    assert batch["image"].shape == (8, 5, 5, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    assert batch["index"].dtype == np.int32 and batch["index"].tolist() == list(range(8))
    assert "text" not in batch


@pytest.mark.parametrize("make", [make_source, Captioned])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(processes, make):
    whole = Loader(make(), 8, 3, **OPTIONS)
    shares = [Loader(make(), 8, 3, **OPTIONS, process_index=k, process_count=processes) for k in range(processes)]
    for n in (0, 4, 7, 123):  # 4 and 7 cross the end of an epoch
        parts = [share[n] for share in shares]
        assert all(len(part["index"]) == 8 // processes for part in parts)
        union = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(union["index"])
        assert_same({name: array[order] for name, array in union.items()}, whole[n])


def test_every_example_occurs_once_per_epoch_and_epochs_differ():
    loader = Loader(make_source(37), 8, 0, image_size=6, channels=3)
    labels = np.concatenate([loader[n]["label"] for n in range(14)])[: 3 * 37].reshape(3, 37)
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(37), (3, 1)))
    assert len({tuple(epoch) for epoch in labels}) == 3


def test_the_seed_decides_the_order():
    def labels(seed):
        return Loader(make_source(), 37, seed, image_size=6, channels=3)[0]["label"].tolist()

    assert labels(1) == labels(1) != labels(2)


@pytest.mark.parametrize("start", [0, 3, 1_000_000])
def test_iterating_from_any_start_gives_the_batches_by_number(start):
    loader = Loader(make_source(), 8, 5, **OPTIONS, num_threads=3)
    loader[0]  # not to time imports
    begin = time.perf_counter()
    batches = loader.iterate(start)
    got = list(itertools.islice(batches, 20))
    assert time.perf_counter() - begin < 2
    for n, batch in enumerate(got, start):
        assert_same(batch, loader[n])


def test_a_batch_does_not_depend_on_what_was_asked_before():
    forwards, backwards = (Loader(Captioned(), 8, 5, **OPTIONS | {"crop": "centre"}) for _ in range(2))
    there = [forwards[n] for n in range(6)]
    back = [backwards[n] for n in reversed(range(6))]
    for a, b in zip(there, reversed(back), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("crop", ["centre", "random"])
@pytest.mark.parametrize("make", [make_source, Captioned])
def test_memory_changes_speed_only(make, crop):
    with_memory = Loader(make(), 8, 5, **OPTIONS | {"crop": crop})
    without = Loader(make(), 8, 5, **OPTIONS | {"crop": crop}, memory_limit=0)
    for n in range(12):
        assert_same(with_memory[n], without[n])


def test_what_fits_into_memory_is_read_once():
    source = Captioned(23)
    options = {"image_size": 6, "channels": 3}
    for n, loader in itertools.product(range(12), [Loader(source, 8, 0, **options)]):
        loader[n]
    assert sorted(source.asked) == list(range(23))
    source.asked.clear()
    loader = Loader(source, 8, 0, **options, memory_limit=23 * 6 * 6 * 3 - 1)  # a byte too little: nothing is kept
    for n in range(12):
        loader[n]
    assert len(source.asked) == 96


def test_flips_happen_half_of_the_time_and_anew_in_each_epoch():
    source = make_source(50, 6, 6)
    loader = Loader(source, 50, 0, image_size=6, channels=3, flip=True)
    flipped = np.empty((40, 50), bool)  # by example
    flipped_place = np.empty((40, 50), bool)  # by position in the batch
    for n in range(40):
        batch = loader[n]
        originals = source.images[batch["label"]]
        unchanged = (batch["image"] == originals).all((1, 2, 3))
        flipped_place[n] = flipped[n, batch["label"]] = ~unchanged
        mirrored = np.where(unchanged[:, None, None, None], originals, originals[:, :, ::-1])
        np.testing.assert_array_equal(batch["image"], mirrored)
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(flipped.size)
    for share in (flipped.mean(0), flipped.mean(1), flipped_place.mean(0)):
        assert (np.abs(share - 0.5) < 0.4).all()  # no image, no batch and no position makes the same choice always


def test_without_flip_and_with_centre_crop_images_are_untouched():
    source = make_source(20, 6, 6)
    batch = Loader(source, 20, 0, image_size=6, channels=3)[0]
    np.testing.assert_array_equal(batch["image"], source.images[batch["label"]])


def test_random_crops_reach_every_place():
    source = make_source(20, 6, 9)
    loader = Loader(source, 20, 0, image_size=6, channels=3, crop="random")
    places = np.zeros(4, int)
    for n in range(40):
        batch = loader[n]
        for image, label in zip(batch["image"], batch["label"], strict=True):
            match = [np.array_equal(image, source.images[label][:, left : left + 6]) for left in range(4)]
            places[match.index(True)] += 1
    assert (np.abs(places - 200) < 4 * np.sqrt(200)).all()


def test_captions_stay_with_their_images():
    source = Captioned()
    batch = Loader(source, 23, 0, image_size=6, channels=3)[0]
    assert sorted(batch["text"]) == sorted(f"caption {i}" for i in range(23))
    alone = {f"caption {i}": source.images[i] for i in range(23)}
    for image, text in zip(batch["image"], batch["text"], strict=True):
        if alone[text].shape == (6, 6, 3):
            np.testing.assert_array_equal(image, alone[text])


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxdiff-loader")]


def test_closing_or_dropping_the_iterator_ends_its_threads():
    loader = Loader(make_source(), 8, 0, **OPTIONS)
    batches = loader.iterate()
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()
    for _ in loader.iterate():
        break
    assert not loader_threads()


def test_an_error_in_a_thread_surfaces_with_the_file_at_its_batch(tmp_path):
    for i in range(6):
        Image.new("RGB", (6, 6)).save(tmp_path / f"{i}.png")
    loader = Loader(open_source("folder", tmp_path), 1, 0, image_size=6, channels=3)
    victim = loader._order[2]
    (tmp_path / f"{victim}.png").unlink()
    batches = loader.iterate()
    next(batches), next(batches)
    with pytest.raises(FileNotFoundError, match=f"{victim}.png"):
        next(batches)
    assert not loader_threads()


SCRIPT = """
import signal, sys, numpy as np
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import ArraySource
source = ArraySource("zeros", np.zeros((50, 8, 8, 1), np.uint8), np.zeros(50, int), ("0",), "nowhere")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background are started without
batches = Loader(source, 8, 0, image_size=8, channels=1).iterate()
next(batches)
print("ready", flush=True)
if sys.argv[1] == "wait":
    for batch in batches:
        pass
"""


@pytest.mark.parametrize("interrupt", [False, True])
def test_the_program_ends_at_once_at_its_end_and_at_ctrl_c(interrupt):
    arguments = [sys.executable, "-c", SCRIPT, "wait" if interrupt else "end"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if interrupt:
            process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()  # or leaving this block would wait for a program that does not end
    assert errors.endswith("KeyboardInterrupt\n") if interrupt else errors == ""
    assert process.returncode == (-signal.SIGINT if interrupt else 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 9, "process_count": 2}, "batch_size 9 is not divisible by the 2 processes"),
        ({"batch_size": 8, "padded_size": 4}, "padded_size 4 is below batch_size 8"),
        ({"batch_size": 7, "padded_size": 9, "process_count": 2}, "padded_size 9 is not divisible by the 2 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not below 2"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"channels": 4}, "channels must be 1"),
        ({"shrink_by": 3}, "shrink_by 3 does not divide image_size 8"),
        ({"crop": "top"}, "crop must be one of centre, random, not 'top'"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_impossible_settings_are_named(wrong, message):
    settings = {"batch_size": 8, "seed": 0, "image_size": 8, "channels": 3} | wrong
    with pytest.raises(ValueError, match=message):
        Loader(make_source(), **settings)


@pytest.mark.parametrize(("padded_size", "processes"), [(8, 1), (8, 4), (16, 2)])
def test_a_padded_batch_is_the_batch_and_repeats_of_weight_0(padded_size, processes):
    """However many processes share it out, of which some then have repeats only; random choices are repeated, too."""
    plain = Loader(make_source(), 5, 3, **OPTIONS)
    shares = [
        Loader(make_source(), 5, 3, **OPTIONS, padded_size=padded_size, process_index=k, process_count=processes)
        for k in range(processes)
    ]
    for n in (0, 11):
        found = [loader[n] for loader in shares]
        assert {len(share["weight"]) for share in found} == {padded_size // processes}
        whole = {name: np.concatenate([share[name] for share in found]) for name in found[0]}
        weight = whole.pop("weight")
        assert_same(
            whole, {name: np.resize(value, (padded_size, *value.shape[1:])) for name, value in plain[n].items()}
        )
        assert weight.dtype == np.float32 and (weight[:5] == weight[0]).all() and not weight[5:].any()
        assert weight.mean() == pytest.approx(1)


@pytest.mark.parametrize("crop", ["centre", "random"])
@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_shrunk_images_are_means_of_the_blocks_of_whole_ones(crop, memory_limit):
    options = OPTIONS | {"crop": crop, "memory_limit": memory_limit}
    whole, small = Loader(make_source(), 8, 0, **options), Loader(make_source(), 8, 0, **options, shrink_by=3)
    for n in (0, 9):
        blocks = whole[n]["image"].reshape(8, 2, 3, 2, 3, 3).astype(np.float64)
        np.testing.assert_array_equal(small[n]["image"], np.floor(blocks.mean((2, 4)) + 0.5))


def test_loaders_in_turn_see_every_image_of_the_order_once():
    """Batches of 8, from number 3 on of 4: as many images as before, none left out and none twice."""
    source, order = make_source(), Loader(make_source(), 8, 7, **OPTIONS)._order
    loaders = [Loader(source, 8, 7, **OPTIONS), Loader(source, 4, 7, **OPTIONS, begin=(3, 24), shrink_by=2)]
    whole = list(itertools.islice(iterate_in_turn(loaders), 6))
    assert [batch["image"].shape[:2] for batch in whole] == [(8, 6)] * 3 + [(4, 3)] * 3
    assert np.concatenate([batch["label"] for batch in whole]).tolist() == [order[i] for i in range(36)]
    for start in range(6):
        for batch, expected in zip(whole[start:], iterate_in_turn(loaders, start), strict=False):
            assert_same(batch, expected)
    with pytest.raises(IndexError, match="numbered from 3"):
        loaders[1][2]


def test_batches_have_no_negative_numbers():
    with pytest.raises(IndexError):
        Loader(make_source(), 8, 0, **OPTIONS)[-1]


def test_a_loader_that_has_had_its_turn_gives_its_memory_back():
    """Else a run that grows would keep its data once for each resolution. A look into the next stage takes nothing away."""
    options = {"image_size": 6, "channels": 3}
    loaders = [Loader(make_source(), 8, 0, **options, begin=(step, 8 * step)) for step in (0, 2, 4)]
    kept = [weakref.ref(loader._memory) for loader in loaders]
    look = iterate_in_turn(loaders, 2)
    next(look)
    look.close()
    assert all(one() is not None for one in kept)
    batches = iterate_in_turn(loaders)
    first = list(itertools.islice(batches, 3))
    assert [one() is not None for one in kept] == [False, True, True]
    batches.close()
    assert_same(loaders[0][0], first[0])
