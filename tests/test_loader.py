"""Loader: batches are functions of (seed, epoch, positions), bit for bit, and its thread always ends."""

import gc
import os
import signal
import subprocess
import textwrap
import threading
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import small_run
from sslrun.data import loader as loader_module
from sslrun.data import reading
from sslrun.data.loader import Loader
from sslrun.data.masks import BlockMask
from sslrun.data.order import Order, Sequential
from sslrun.data.pipeline import Pipeline
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import ColorJitter, Normalize, RandomHorizontalFlip, RandomResizedCrop, Resize
from sslrun.data.views import ViewGroup

NUM_IMAGES = 26


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = root / "xyz"[i % 3] / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse.resize((40 + i, 64 - i), Image.Resampling.BICUBIC).save(path, quality=90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLRUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = ImageFolder(str(root))
        folder.open()
        assert folder.sizes.shape == (NUM_IMAGES, 2)
    return folder


def views():
    crop = [RandomResizedCrop(24, scale=[0.2, 1.0]), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomHorizontalFlip()]
    small = [RandomResizedCrop(16, scale=[0.05, 0.2]), RandomHorizontalFlip(), Normalize()]
    mask = BlockMask([0.2, 0.6], probability=0.5, samples=4, patch_size=4)
    return [ViewGroup(2, [*crop, Normalize()]), ViewGroup(1, small, mask)]


def cursor(batch_size, epochs=2, start=0):
    """Positions of some epochs in batches; the last batch of an epoch continues past its end."""
    per_epoch = -(-NUM_IMAGES // batch_size)
    for step in range(start, epochs * per_epoch):
        epoch, within = divmod(step, per_epoch)
        yield epoch, np.arange(within * batch_size, (within + 1) * batch_size)


def samples(source, cursor, **options):
    """(epoch, position) -> id, label and the bytes of all views and masks of the sample there."""
    options = {"seed": 5, "batch_size": 32, "sampler": Order(len(source), options.get("seed", 5))} | options
    items = list(cursor)
    rows_at = {}
    for (epoch, positions), batch in zip(items, Loader(source, views(), **options).run(items), strict=True):
        parts = [view.reshape(-1, len(positions), view[0].numel()).transpose(0, 1) for view in batch.views]
        rows = torch.cat([part.flatten(1) for part in parts], dim=1)
        for row, position in enumerate(positions.tolist()):
            rows_at[epoch, position] = (
                int(batch.index[row]),
                int(batch.label[row]),
                rows[row].numpy().tobytes(),
                batch.masks[1].hidden[row].numpy().tobytes(),
            )
    return rows_at


MODES = ["exact", "dali"]


@pytest.fixture(scope="module", params=MODES)
def reference(request, source):
    return request.param, samples(source, cursor(8), num_threads=1, prefetch=1, augment=request.param)


@pytest.mark.parametrize(
    ("batch_size", "options"), [(8, {"num_threads": 2, "prefetch": 3}), (5, {"num_threads": 2}), (26, {})]
)
def test_threads_prefetch_and_grouping_change_nothing(source, reference, batch_size, options):
    mode, expected = reference
    rows_at = samples(source, cursor(batch_size), augment=mode, **options)
    common = rows_at.keys() & expected.keys()
    assert len(common) >= 2 * NUM_IMAGES
    assert all(rows_at[key] == expected[key] for key in common)


def test_restart_in_the_middle_changes_nothing(source, reference):
    mode, expected = reference
    rows_at = samples(source, cursor(8, start=3), augment=mode)
    assert len(rows_at) == 5 * 8 and rows_at == {key: expected[key] for key in rows_at}


def test_another_seed_epoch_or_position_changes_the_pixels(source, reference):
    """Negative control of the comparisons above."""
    mode, expected = reference
    other_seed = samples(source, cursor(8, epochs=1), seed=6, sampler=Order(len(source), 5), augment=mode)
    assert all(other_seed[key][0] == expected[key][0] for key in other_seed)
    assert not any(other_seed[key][2] == expected[key][2] for key in other_seed)
    by_sample = {}
    for (epoch, position), (sample, _, pixels, _) in expected.items():
        by_sample.setdefault(sample, []).append((epoch, position, pixels))
    assert all(len({pixels for *_, pixels in seen}) == len(seen) >= 2 for seen in by_sample.values())
    assert any(len({epoch for epoch, *_ in seen}) < len(seen) for seen in by_sample.values())  # filled up, own crops


def test_order_labels_and_layout(source):
    order = Order(len(source), 0)
    plain = [
        ViewGroup(2, [Resize([20, 30]), Normalize()]),
        ViewGroup(1, [Resize([10, 10]), RandomHorizontalFlip(p=1.0)]),
    ]
    loader = Loader(source, plain, sampler=order, seed=0, batch_size=4)
    (batch,) = loader.run([(1, np.array([7, 0, 25]))])
    assert batch.index.tolist() == order.ids(1, np.array([7, 0, 25])).tolist()
    assert batch.label.tolist() == source.labels[batch.index].tolist()
    assert [tuple(view.shape) for view in batch.views] == [(6, 3, 20, 30), (3, 3, 10, 10)]
    assert all(v.is_contiguous(memory_format=torch.channels_last) and v.dtype == torch.float32 for v in batch.views)
    assert torch.equal(batch.views[0][:3], batch.views[0][3:])
    assert not torch.equal(batch.views[0][0], batch.views[0][1])


def test_whole_images_are_those_of_pil(source):
    height, width = source.sizes[4].tolist()
    whole = [ViewGroup(1, [Resize([height, width])])]
    loader = Loader(source, whole, sampler=Sequential(len(source)), seed=0, batch_size=1)
    (batch,) = loader.run([(0, np.array([4]))])
    expected = np.asarray(Image.open(source.names[4]).convert("RGB"))
    assert np.array_equal(np.rint(batch.views[0][0].permute(1, 2, 0).numpy() * 255), expected)


def data_threads():
    """Threads of loaders."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("sslrun")]


def loader_of(source, **options):
    options = {"sampler": Sequential(len(source)), "seed": 0, "batch_size": 8, "prefetch": 1} | options
    return Loader(source, views(), **options)


def test_stream_ends_and_its_thread_with_it(source):
    stream = loader_of(source).run(cursor(8))
    assert len(list(stream)) == 8
    assert next(stream, None) is None
    assert not data_threads()


def test_close_and_forgetting_end_the_thread(source):
    stream = loader_of(source).run(cursor(8, epochs=1000))
    next(stream)
    stream.close()
    stream.close()
    assert next(stream, None) is None
    gc.collect()
    assert not data_threads()
    stream = loader_of(source).run(cursor(8, epochs=1000))
    next(stream)
    del stream
    gc.collect()
    assert not data_threads()


def test_errors_reach_the_consumer_after_the_batches_before_them(source):
    def breaks():
        yield from cursor(8, epochs=1)
        raise KeyError("an error of the cursor")

    stream = loader_of(source).run(breaks())
    for _ in range(4):
        next(stream)
    with pytest.raises(KeyError, match="an error of the cursor"):
        next(stream)
    assert next(stream, None) is None and not data_threads()


def test_an_error_in_the_consumer_leaves_no_thread(source):
    def consume():
        for _ in loader_of(source).run(cursor(8, epochs=1000)):
            raise ValueError("training failed")

    with pytest.raises(ValueError, match="training failed"):
        consume()
    gc.collect()
    assert not data_threads()


@pytest.mark.parametrize("mode", MODES)
def test_threads_and_prefetch_reach_dali(source, monkeypatch, mode):
    """DALI has the threads and the queue depth asked for; as many batches are being read and finished, no more."""
    graphs, begun, build = [], [], Pipeline._build
    monkeypatch.setattr(Pipeline, "_build", lambda self, feed: graphs.append(build(self, feed)) or graphs[-1])

    def noted():
        for item in cursor(8, epochs=100):
            begun.append(item)
            yield item

    for prefetch in (1, 4):
        begun.clear()
        stream = loader_of(source, num_threads=3, prefetch=prefetch, augment=mode).run(noted())
        next(stream)
        deadline = time.monotonic() + 60
        while len(begun) < 1 + 3 * prefetch and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(begun) == 1 + 3 * prefetch  # the one that was taken, those that wait, in the graph, being read
        stream.close()
        assert (graphs[-1].num_threads, graphs[-1].prefetch_queue_depth) == (3, prefetch)


class Together(ImageFolder):
    """Reads take some time, and complete only when as many are under way as the barrier has parties."""

    barrier: threading.Barrier
    patience_s = 20.0

    def encoded(self, ids):
        self.barrier.wait(timeout=self.patience_s)
        time.sleep(0.05 * len(ids))
        return super().encoded(ids)


@pytest.mark.parametrize(("parties", "num_threads"), [(8, 1), (12, 12)])
def test_a_slow_disk_has_many_reads_in_flight(source, parties, num_threads):
    slow = Together(os.path.commonpath(source.names))
    slow.open()
    slow.barrier = threading.Barrier(parties)
    positions = np.arange(24) % NUM_IMAGES
    loader = loader_of(slow, num_threads=num_threads, batch_size=24)
    batches = list(loader.run([(0, positions)] * 3))
    assert [batch.index.tolist() for batch in batches] == [positions.tolist()] * 3
    slow.barrier, slow.patience_s = threading.Barrier(parties + 1), 1.0  # one more than there are threads: it can fail
    with pytest.raises(threading.BrokenBarrierError):
        list(loader_of(slow, num_threads=num_threads, batch_size=24, prefetch=1).run([(0, positions)]))
    assert not data_threads()


def test_quick_reads_are_the_work_of_one_thread_until_they_get_slow(source, monkeypatch):
    clock, read_s, threads = 0.0, 1e-4, []

    class Timed(ImageFolder):
        def encoded(self, ids):
            nonlocal clock
            clock += read_s * len(ids)
            threads.append(threading.get_ident())
            return super().encoded(ids)

    timed = Timed(os.path.commonpath(source.names))
    timed.open()
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: clock))
    readers = reading.Readers(timed, num_threads=1)

    def batches(count):
        """How many calls of `encoded` each of some batches takes, and how many threads make them all."""
        threads.clear()
        calls = [len(readers.start(np.arange(24)).result(lambda: None) and threads) for _ in range(count)]
        return np.diff([0, *calls]).tolist(), len(set(threads))

    assert batches(1)[0] == [8]  # as long as nothing is known
    batches(3)
    assert batches(20) == ([1] * 20, 1)
    read_s = 0.01
    assert batches(3)[0] == [1, 8, 8]
    read_s = 1e-4
    assert batches(3)[0][0] == 8
    assert batches(20) == ([1] * 20, 1)
    readers.close()
    assert not data_threads()


def test_a_bug_in_a_source_ends_the_stream_and_is_not_a_bad_image(source):
    class Mistaken(ImageFolder):
        def encoded(self, ids):
            if 17 in ids:
                raise KeyError("a bug of the source")
            return super().encoded(ids)

    mistaken = Mistaken(os.path.commonpath(source.names))
    mistaken.open()
    loader = loader_of(mistaken)
    stream = loader.run(cursor(8))
    assert [next(stream).index.tolist() for _ in range(2)] == [[*range(8)], [*range(8, 16)]]
    with pytest.raises(KeyError, match="a bug of the source"):
        next(stream)
    assert not loader.bad.found and not data_threads()


def test_what_dali_made_is_held_until_the_device_has_read_it():
    read = {"first": True, "second": False, "third": True}
    in_use = deque((name, SimpleNamespace(query=lambda name=name: read[name])) for name in read)
    loader_module._drop_finished(in_use)
    assert [name for name, _ in in_use] == ["second", "third"]
    read["second"] = True
    loader_module._drop_finished(in_use)
    loader_module._drop_finished(in_use)
    assert not in_use


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_batches_on_a_gpu_do_not_depend_on_who_waits(source, mode):
    """A race between DALI, the stage and the consumer would show as pixels of another batch."""

    def batches(wait):
        loader = loader_of(source, device="cuda:0", augment=mode, prefetch=4)
        kept = []
        for batch in loader.run(cursor(8, epochs=20)):
            if wait:
                torch.cuda.synchronize()
            kept.append([view.clone() for view in batch.views])
        return kept

    patient, hasty = batches(True), batches(False)
    assert len(patient) == len(hasty) and all(
        torch.equal(a, b) for one, other in zip(patient, hasty, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_waiting_is_measured(source):
    def slow():
        for item in cursor(8, epochs=1):
            time.sleep(0.05)
            yield item

    stream = loader_of(source).run(slow())
    assert len(list(stream)) == 4 and stream.wait_s > 0.15
    ready = loader_of(source, prefetch=4).run(cursor(8, epochs=1))
    next(ready)
    time.sleep(1.0)
    before = ready.wait_s
    next(ready)
    assert ready.wait_s - before < 0.05


@pytest.mark.parametrize("ending", ["exit", "interrupt"])
def test_process_ends_with_an_open_stream(source, ending):
    # A suite started in the background hands down that SIGINT is to be ignored.
    script = f"""
        import itertools, signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import numpy as np
        from sslrun.data.loader import Loader
        from sslrun.data.order import Sequential
        from sslrun.data.sources.image_folder import ImageFolder
        from sslrun.data.views import ViewGroup
        from sslrun.data.transforms import Resize
        source = ImageFolder({os.path.dirname(os.path.dirname(source.names[0]))!r})
        source.open()
        loader = Loader(source, [ViewGroup(1, [Resize([8, 8])])], sampler=Sequential(26), seed=0, batch_size=4)
        stream = loader.run((0, np.arange(4)) for _ in itertools.count())
        next(stream)
        print("started", flush=True)
        while {ending == "interrupt"}:
            next(stream)
    """
    process = small_run.python(textwrap.dedent(script), stderr=subprocess.PIPE)
    assert process.stdout.readline() == "started\n"
    if ending == "interrupt":
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    if ending == "exit":
        assert process.returncode == 0 and stderr == ""
    else:
        assert process.returncode == -signal.SIGINT and stderr.rstrip().endswith("KeyboardInterrupt")
