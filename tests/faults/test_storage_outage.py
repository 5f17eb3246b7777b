"""Storage that gives errors is waited for: an image is bad only if it was read and is none."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from faulty_source import NUM_IMAGES, After, Faulty, epochs, loader_of, opened, rows, write_images

import small_run
from sslrun.cli import main
from sslrun.data import outage
from sslrun.data.bad_samples import BadSamples
from sslrun.data.outage import Patience, Record, Unreadable
from sslrun.data.reading import read_all
from sslrun.data.sources import files
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import durable

FAULTS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN]
FAULTS += [errno.ENETUNREACH, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPERM]
DEFINITE = [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO]


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(durable, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(durable, "RETRY_S", 0.3)


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def source(root):
    source = opened(root)
    assert source.sizes.min() > 0
    return source


def messages(caplog, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def test_which_errors_say_something_about_a_file():
    assert all(durable.is_outage(OSError(number, "")) for number in FAULTS)
    assert not any(durable.is_outage(OSError(number, "")) for number in DEFINITE)
    assert durable.is_outage(TimeoutError()) and durable.is_outage(ConnectionResetError("by peer"))
    assert not durable.is_outage(OSError("not an image"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["", "11.jpg"])
def test_an_outage_that_ends_changes_nothing(source, caplog, monkeypatch, number, name):
    monkeypatch.setattr(durable, "RETRY_S", 60.0)
    expected = rows(loader_of(source).run(epochs()))
    bad = BadSamples(max_bad_pct=0)
    loader = loader_of(source, bad)
    source.errors = After(20, number, (name,)) if not name else After(3, number, (name,))
    assert rows(loader.run(epochs())) == expected
    assert not bad.found and not bad.absent and not bad.state_dict()
    assert len(messages(caplog, "storage error: ")) == len(messages(caplog, "the storage can be read again")) >= 1
    assert not messages(caplog, "replaced for")


def test_a_storage_that_gives_nothing_ends_the_run_and_blames_no_image(source, caplog):
    bad = BadSamples()
    stream = loader_of(source, bad).run(epochs())
    next(stream)
    source.errors = {"": errno.ESTALE}
    with pytest.raises(RunFailed, match=r"\.jpg: .*[Ss]tale.*: no image can be read \(tried for \d+ s\)"):
        list(stream)
    assert not bad.found and not bad.absent
    assert len(messages(caplog, "storage error: ")) == 1


def test_a_file_that_cannot_be_read_is_replaced_for_an_epoch_and_not_remembered(source, caplog):
    expected = rows(loader_of(source).run(epochs(2)))
    source.errors = {"11.jpg": errno.EACCES}
    bad = BadSamples(max_bad_pct=5)

    def repaired():
        for epoch, positions in epochs(2):
            if epoch == 1 and positions[0] == 0:
                source.errors = {}
            yield epoch, positions

    delivered = rows(loader_of(source, bad).run(repaired()))
    assert [k for k, (one, other) in enumerate(zip(delivered, expected, strict=True)) if one != other] == [11]
    assert not bad.state_dict() and not bad.absent
    (line,) = messages(caplog, "replaced for this epoch")
    assert "differs from an undisturbed one" in line and line.endswith("11.jpg: permission denied")
    source.errors = {"11.jpg": errno.EACCES}
    again = rows(loader_of(source, BadSamples(5), batch_size=20).run(epochs(1, batch_size=20)))
    assert again == delivered[:NUM_IMAGES]  # its substitute is a function of the position


def test_it_counts_against_the_limit_of_bad_images(source):
    source.errors = {f"{i:02d}.jpg": errno.EACCES for i in (3, 11, 20)}
    bad = BadSamples(max_bad_pct=5)
    with pytest.raises(RunFailed, match=r"3 of 40 .*3 of them not even read, .*max_bad_pct = 5; .*20\.jpg: permission"):
        list(loader_of(source, bad).run(epochs()))
    assert not bad.found


def test_many_such_files_are_waited_for_once(source, caplog):
    source.errors = {f"{i:02d}.jpg": errno.EACCES for i in range(0, 40, 4)}
    bad = BadSamples(max_bad_pct=50)
    delivered = rows(loader_of(source, bad).run(epochs(2)))
    assert len(delivered) == 2 * NUM_IMAGES and not any(sample % 4 == 0 for sample, _ in delivered)
    assert len(messages(caplog, "storage error: ")) == 1 and len(messages(caplog, "replaced for")) == 10
    source.errors = {"": errno.EIO}  # and yet an outage of all is waited for
    with pytest.raises(RunFailed, match="no image can be read"):
        list(loader_of(source, bad).run(epochs()))


def test_reads_after_the_first_error_of_a_thread_are_not_tried(source):
    """A mount that gives up after minutes would take them for each file."""
    source.errors, source.reads = {"": errno.ETIMEDOUT}, {}
    assert read_all(source, np.arange(10)) == [Unreadable("connection timed out", is_outage=True)] * 10
    assert source.reads == {"00.jpg": 2}


@pytest.mark.parametrize("readable", range(0, 12, 5))
def test_one_image_that_can_be_read_is_found(readable):
    """Then the storage is not out of order, only the other files are."""
    reads = [b"" if i == readable else Unreadable("denied", is_outage=True) for i in range(12)]
    patience = Patience(lambda ids: [reads[i] for i in ids], [""] * 12, lambda: None, Record())
    others = np.delete(np.arange(12), readable)
    assert [read.is_outage for read in patience.settle(others, [reads[i] for i in others])] == [True] * 11


@pytest.mark.parametrize("gone", ["0", "."])
def test_an_unmounted_disk_is_an_outage(source, root, monkeypatch, gone):
    expected = rows(loader_of(source).run(epochs()))
    folder, aside = root / gone, root.parent / "aside"
    put_back = outage.Patience._pause

    def pause(self, *arguments):
        if aside.exists():
            folder.rmdir()
            aside.rename(folder)
        put_back(self, *arguments)

    monkeypatch.setattr(outage.Patience, "_pause", pause)
    folder.rename(aside)
    folder.mkdir()  # the mount point is there, and empty
    bad = BadSamples(max_bad_pct=0)
    assert rows(loader_of(source, bad).run(epochs())) == expected and not bad.found


def test_a_missing_file_beside_others_is_bad(source, root):
    (root / "0" / "11.jpg").unlink()
    bad = BadSamples(max_bad_pct=5)
    assert len(rows(loader_of(source, bad).run(epochs()))) == NUM_IMAGES
    assert list(bad.found) == [11] and not bad.absent


def test_a_file_that_becomes_shorter_while_it_is_read_is_read_again(root, monkeypatch):
    path, read = str(root / "0" / "03.jpg"), os.read
    monkeypatch.setattr(files.os, "read", lambda descriptor, size: b"")
    with pytest.raises(OSError, match="shorter") as error:
        files.read_file(path)
    assert durable.is_outage(error.value)
    monkeypatch.setattr(files.os, "read", read)
    assert files.read_file(path) == Path(path).read_bytes()


def test_sizes_survive_an_outage(root, monkeypatch):
    expected = opened(root).sizes
    shutil.rmtree(root.parent / "cache")
    monkeypatch.setattr(durable, "RETRY_S", 60.0)
    source = opened(root)
    source.errors = After(30)
    assert np.array_equal(source.sizes, expected)
    (kept,) = (root.parent / "cache" / "index").iterdir()
    assert np.array_equal(np.load(kept), expected)


def test_a_size_that_is_not_known_is_not_kept_as_broken(root, caplog):
    expected = rows(loader_of(opened(root)).run(epochs()))
    shutil.rmtree(root.parent / "cache")
    source = opened(root)
    source.errors = {"11.jpg": errno.EIO, "12.jpg": errno.EIO}
    assert source.sizes[[11, 12]].tolist() == [[0, 0], [0, 0]]
    assert len(messages(caplog, "the sizes of 2 images are not known")) == 1
    loader = loader_of(source, BadSamples(max_bad_pct=0))
    source.errors = {}
    assert rows(loader.run(epochs())) == expected  # read with the image
    later = opened(root)
    later.errors, later.reads = {"11.jpg": errno.EIO}, {}
    assert later.sizes[11].tolist() == [0, 0] and later.sizes[12].min() > 0
    assert later.reads["12.jpg"] == 1 and len(later.reads) < NUM_IMAGES  # these two, and probes whether others are read
    assert opened(root).sizes.min() > 0
    last = opened(root)
    assert last.sizes.min() > 0 and not last.reads


def test_a_broken_header_is_kept_as_broken(root):
    (root / "0" / "05.jpg").write_text("no image")
    assert opened(root).sizes[5].tolist() == [0, 0]
    later = opened(root)
    assert later.sizes[5].tolist() == [0, 0] and not later.reads


def test_an_index_of_storage_that_gives_nothing_is_not_kept(root):
    source = opened(root)
    source.errors = {"": errno.EIO}
    with pytest.raises(RunFailed, match="no image can be read"):
        _ = source.sizes
    assert not (root.parent / "cache").exists()


class Listed(Faulty, listed=False):
    """Listing gives errors."""

    listings = After(2)

    def list_samples(self, key):
        if number := self.listings.get(""):
            raise OSError(number, os.strerror(number), self.data_prefix)
        return super().list_samples(key)


def test_listing_is_tried_again(root, monkeypatch):
    monkeypatch.setattr(Listed, "listings", After(2))
    assert len(opened(root, Listed)) == NUM_IMAGES
    monkeypatch.setattr(Listed, "listings", After(10**6))
    with pytest.raises(RunFailed, match="cannot be read: Input/output error"):
        opened(root, Listed)
    monkeypatch.setattr(Listed, "listings", After(1, errno.EACCES))
    with pytest.raises(UsageError, match=r"Permission denied: data\.source cannot be read"):
        opened(root, Listed)


@pytest.mark.parametrize("recovers", [True, False])
def test_data_check_calls_it_not_read(root, capsys, monkeypatch, recovers):
    (root / "0" / "05.jpg").write_text("no image")
    errors = After(2 if recovers else 10**6, names=("11.jpg",))
    opening = files.FileSource.open_encoded

    def open_encoded(self, sample):
        path = self.names[sample]
        if number := errors.get(os.path.basename(path)):
            raise OSError(number, os.strerror(number), path)
        return opening(self, sample)

    monkeypatch.setattr(files.FileSource, "open_encoded", open_encoded)
    monkeypatch.setattr(durable, "RETRY_S", 60.0 if recovers else 0.1)
    code = main(["data", "check", str(root), "--json", "--workers", "1"])
    (entry,) = json.loads(capsys.readouterr().out)["sources"]
    assert code == 1 and [os.path.basename(one["path"]) for one in entry["unreadable"]] == ["05.jpg"]
    assert [one["reason"] for one in entry["not_read"]] == ([] if recovers else ["input/output error"])


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """faulty_storage.c, to be preloaded."""
    path = tmp_path_factory.mktemp("library") / "faulty_storage.so"
    program = Path(__file__).with_name("faulty_storage.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(path), str(program), "-ldl"], check=True)
    return path


@pytest.fixture
def faulty_run(tmp_path, images, library, monkeypatch):
    """Starts a training of 30 steps in a process whose storage can be made faulty; (recipe, run folder, table)."""
    table = tmp_path / "faults"
    monkeypatch.setenv("STORAGE_FAULT", str(table))
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    own = Path(shutil.copytree(images, tmp_path / "own"))
    recipe = small_run.write_recipe(tmp_path, own, steps=30)
    recipe.write_text(recipe.read_text().replace("knn_interval = 1", "knn_interval = 0"))

    def start(*options: str) -> subprocess.Popen:
        monkeypatch.setenv("LD_PRELOAD", str(library))
        process = small_run.start(small_run.command(recipe, *options))
        monkeypatch.delenv("LD_PRELOAD")
        return process

    return start, tmp_path / "runs/small", table, own


@pytest.mark.nightly
@pytest.mark.parametrize("call", ["open", "read"])
def test_a_training_over_an_outage_is_the_undisturbed_one(faulty_run, tmp_path, call):
    start, run, table, own = faulty_run
    assert small_run.finish(start())[0] == 0
    undisturbed = run.rename(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "cache")
    table.write_text(f"{call} {errno.EIO} {own}/class_2/\n")  # from the making of the index on, before there is a log
    process = start()
    while "storage error" not in (line := process.stdout.readline()):
        assert line, "it has ended"
    table.unlink()
    small_run.wait_until(lambda: small_run.last_step(run) >= 6, process)
    table.write_text(f"{call} {errno.ESTALE} {own}/\n")
    small_run.wait_until(lambda: "storage error" in log(run, process) or process.poll() is not None, process)
    table.unlink()
    code, output = small_run.finish(process)
    assert code == 0, output
    assert "can be read again" in output and "replaced for" not in output
    assert not small_run.differences(small_run.saved(undisturbed, 30), small_run.saved(run, 30))


def log(run: Path, process: subprocess.Popen) -> str:
    path = run / "log.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.nightly
def test_a_training_whose_storage_gives_nothing_fails_and_resumes_exactly(faulty_run, tmp_path):
    start, run, table, own = faulty_run
    assert small_run.finish(start())[0] == 0
    undisturbed = run.rename(tmp_path / "undisturbed")
    process = start()
    small_run.wait_until(lambda: small_run.last_step(run) >= 6, process)
    table.write_text(f"open {errno.EIO} {own}/\n")
    code, output = small_run.finish(process, timeout_s=240)
    line = output.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in output
    assert line.startswith(f"error: {own}/") and "no image can be read (tried for 6" in line
    table.unlink()
    code, output = small_run.finish(start("--resume"))
    assert code == 0, output
    assert not small_run.differences(small_run.saved(undisturbed, 30), small_run.saved(run, 30))


@pytest.mark.nightly
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_training_whose_storage_hangs_says_so_and_is_stopped_and_saved(faulty_run, tmp_path, number, expected):
    start, run, table, own = faulty_run
    assert small_run.finish(start())[0] == 0
    undisturbed = run.rename(tmp_path / "undisturbed")
    process = start()
    small_run.wait_until(lambda: small_run.last_step(run) >= 6, process)
    table.write_text(f"open 0 {own}/\n")
    small_run.wait_until(lambda: "waiting for data for 30 s: " in log(run, process), process)
    os.killpg(process.pid, number)
    code, output = small_run.finish(process, timeout_s=60)
    assert code == expected and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if "waiting for data" in line]
    assert f"waiting for data for 30 s: {own}/class_" in line and line.endswith(".jpg is being read")
    table.unlink()
    code, output = small_run.finish(start("--resume"))
    assert code == 0, output
    assert not small_run.differences(small_run.saved(undisturbed, 30), small_run.saved(run, 30))
