"""Reads that do not come back: the log says what is waited for, and nothing waits for them that need not."""

import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
from faulty_source import NUM_IMAGES, Faulty, epochs, loader_of, opened, rows, write_images

import small_run
from sslrun.cli import main
from sslrun.data import loader as loader_module
from sslrun.data import waiting
from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.files import FileSource, read_file
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.in_memory import InMemory, numbered
from sslrun.data.transforms import Resize
from sslrun.data.views import ViewGroup
from sslrun.runtime import signals

MOST_S = 20.0  # a generous bound of what takes one or two seconds; whoever waits for a stuck read takes for ever


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    source = opened(write_images(tmp_path / "images"))
    assert source.sizes.min() > 0
    yield source
    source.released.set()


def soon(threads: list[str]) -> bool:
    """Whether all threads with these names end within some seconds."""
    deadline = time.monotonic() + MOST_S
    while any(thread.name in threads for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def messages(caplog, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def release_once_told(source, caplog) -> None:
    deadline = time.monotonic() + MOST_S
    while not messages(caplog, "11.jpg is being read") and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # a second line would come
    source.released.set()


def test_a_long_wait_is_told_once_with_the_path_and_its_end_too(source, caplog, monkeypatch):
    expected = rows(loader_of(source).run(epochs()))
    source.hung = {"11.jpg"}
    stream = loader_of(source).run(epochs())
    delivered = rows([next(stream)])
    monkeypatch.setattr(waiting, "NOTICE_S", 0.3)
    threading.Thread(target=release_once_told, args=(source, caplog)).start()
    assert delivered + rows(stream) == expected
    assert len(messages(caplog, "0/11.jpg is being read")) == 1
    assert messages(caplog, "11.jpg")[0].startswith("waiting for data for 0 s: /")
    assert messages(caplog, "data comes again, after ")


def test_what_is_not_a_read_is_told_too(source, caplog, monkeypatch):
    monkeypatch.setattr(waiting, "NOTICE_S", 0.3)

    class Slow(Sequential):
        def ids(self, epoch, positions):
            time.sleep(0.8)
            return super().ids(epoch, positions)

    next(loader_of(source, sampler=Slow(len(source))).run(epochs()))
    assert messages(caplog, "waiting for data for 0 s: the order of samples is being made")


def test_closing_does_not_wait_for_a_read(source):
    stream = loader_of(source).run(epochs())
    next(stream)
    source.hung = {f"{i:02d}.jpg" for i in range(NUM_IMAGES)}
    stream = loader_of(source).run(epochs())
    time.sleep(0.3)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < MOST_S and soon(["sslrun-data"])
    assert [thread for thread in threading.enumerate() if thread.name == "sslrun-read"], "it is stuck indeed"
    source.released.set()
    assert soon(["sslrun-read"])


def test_a_stop_ends_the_wait_for_data(source, monkeypatch):
    monkeypatch.setattr(loader_module, "_STOP_AFTER_S", 0.5)
    source.hung = {"20.jpg"}
    stream = loader_of(source).run(epochs())
    assert [next(stream).index.tolist() for _ in range(2)] == [[*range(8)], [*range(8, 16)]]
    monkeypatch.setattr(signals, "requested", lambda: 75)
    begin = time.monotonic()
    with pytest.raises(signals.Stopped) as stopped:
        next(stream)
    assert stopped.value.exit_code == 75 and 0.5 <= time.monotonic() - begin < MOST_S
    assert soon(["sslrun-data"]) and next(stream, None) is None


def test_a_batch_that_comes_is_taken_though_a_stop_is_requested(source, monkeypatch):
    monkeypatch.setattr(signals, "requested", lambda: 75)
    assert len(list(loader_of(source).run(epochs()))) == 5


class HungListing(ImageFolder, listed=False):
    """Its folder cannot be listed before `released` is set."""

    released = threading.Event()

    def list_samples(self, key):
        self.released.wait()
        return super().list_samples(key)


@pytest.mark.parametrize("place", ["listing", "sizes"])
def test_a_stop_ends_the_wait_for_the_source(source, caplog, monkeypatch, place):
    monkeypatch.setattr(waiting, "NOTICE_S", 0.3)
    asked = iter([0] * 4)
    monkeypatch.setattr(signals, "requested", lambda: next(asked, 130))
    folder = source.data_prefix
    if place == "listing":
        stuck = HungListing(folder)
        expected, begin = f"HungListing({folder!r}) is being listed", stuck.open
    else:
        stuck = Faulty(folder)
        stuck.names, stuck.hung = source.names, {"11.jpg"}
        (cached,) = os.scandir(os.path.join(os.environ["SSLRUN_CACHE"], "index"))
        os.remove(cached)
        expected, begin = "11.jpg is being read", lambda: loader_of(stuck).run(epochs())
    with pytest.raises(signals.Stopped) as stopped:
        begin()
    stuck.released.set()
    assert stopped.value.exit_code == 130 and soon(["sslrun-open", "sslrun-index"])
    assert messages(caplog, "waiting for data for")[0].endswith(expected)


def test_ctrl_c_ends_the_wait_for_the_source(source):
    stuck = HungListing(source.data_prefix)
    stuck.released = threading.Event()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        stuck.open()
    stuck.released.set()
    assert soon(["sslrun-open"])


def test_ctrl_c_ends_a_data_check_whose_reads_are_stuck(source, monkeypatch, capsys):
    opening, stuck = FileSource.open_encoded, threading.Event()

    def open_encoded(self, sample):
        if self.names[sample].endswith("39.jpg"):
            stuck.set()
            source.released.wait()
        return opening(self, sample)

    monkeypatch.setattr(FileSource, "open_encoded", open_encoded)
    interrupt = threading.Thread(target=lambda: stuck.wait(MOST_S) and os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    assert main(["data", "check", source.data_prefix, "--workers", "1"]) == 130
    assert "interrupted" in capsys.readouterr().err
    source.released.set()
    assert soon(["sslrun-check"])


class Pixels(InMemory, listed=False):
    """Decoded images that hang."""

    folders = ()
    released = threading.Event()

    def list_samples(self, key):
        self.pixels = np.zeros((8, 10, 10, 3), np.uint8)
        return numbered(["pixels"], [8])

    def decoded(self, ids, device):
        self.released.wait()
        return super().decoded(ids, device)


def test_closing_leaves_a_thread_that_is_stuck_in_a_source_of_pixels(monkeypatch):
    monkeypatch.setattr(loader_module, "_STUCK_S", 0.3)
    pixels = Pixels("unused", "train")
    pixels.open()
    loader = Loader(pixels, [ViewGroup(1, [Resize([8, 8])])], sampler=Sequential(8), seed=0, batch_size=8)
    stream = loader.run([(0, np.arange(8))])
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < MOST_S
    pixels.released.set()
    assert soon(["sslrun-data"])


def test_what_is_no_file_is_named_as_bad_and_waited_for_by_nobody(tmp_path):
    root = write_images(tmp_path / "images") / "0"
    os.mkfifo(root / "a_pipe.jpg")
    (root / "link_to_a_pipe.jpg").symlink_to(root / "a_pipe.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    listening = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(root)  # a socket's path is short
    listening.bind("socket.jpg")
    os.chdir(here)
    source = ImageFolder(str(root.parent))
    source.open()
    bad = BadSamples(max_bad_pct=20)
    batches = loader_of(source, bad).run([(0, np.arange(i, i + 4)) for i in range(0, len(source), 4)])
    assert len(list(batches)) == len(source) / 4 == 11
    reasons = {os.path.basename(text.split(": ")[0]): text.rpartition(": ")[2] for text in bad.found.values()}
    other = {"socket.jpg": "no such device or address"}
    assert reasons == {name: "not a file" for name in ("a_pipe.jpg", "link_to_a_pipe.jpg", "device.jpg")} | other
    listening.close()


@pytest.mark.parametrize("reader", ["read_file", "open_encoded"])
def test_a_pipe_is_opened_by_no_reader(tmp_path, reader):
    os.mkfifo(tmp_path / "x.jpg")
    source = ImageFolder(str(tmp_path))
    source.open()
    with pytest.raises(OSError, match="not a file"):
        read_file(source.names[0]) if reader == "read_file" else source.open_encoded(0)


@pytest.mark.nightly
@pytest.mark.parametrize("ending", ["exit", "interrupt"])
def test_a_process_ends_though_reads_are_stuck(source, ending):
    script = """
        import sys, threading
        import numpy as np
        from faulty_source import epochs, loader_of, opened
        source = opened(sys.argv[1])
        source.sizes
        source.hung = {"20.jpg", "21.jpg", "30.jpg"}
        stream = loader_of(source).run(epochs())
        next(stream)
        print("ready", flush=True)
        if sys.argv[2] == "interrupt":
            import signal
            signal.signal(signal.SIGINT, signal.default_int_handler)
            list(stream)
    """
    lines = [f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})", *script.splitlines()]
    process = small_run.python("\n".join(line.removeprefix(" " * 8) for line in lines), source.data_prefix, ending)
    assert process.stdout.readline() == "ready\n"
    if ending == "interrupt":
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == (0 if ending == "exit" else -signal.SIGINT)
