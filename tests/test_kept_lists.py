"""Lists and sizes of image files that are kept: equal to new ones, noticed changes, several processes, kills."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslrun.data import index, table, waiting
from sslrun.data.sources import file_sizes, kept, seen
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.image_list import ImageList
from sslrun.data.sources.imagenet import ImageNet
from sslrun.data.sources.imagenet100 import ImageNet100
from sslrun.data.sources.inaturalist2018 import INaturalist2018
from sslrun.data.sources.places205 import Places205
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import durable


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SSLRUN_CACHE", str(folder))
    monkeypatch.setattr(seen, "SETTLED_S", -1e6)  # lists of new folders are kept, too
    return folder


def image(path, height=8, width=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    odd = [os.fsdecode(b"b/\xff\xfe.jpg"), "b/with space.jpg", "b/ü.jpg", "b/line\nbreak.jpg"]
    for height, name in enumerate(["a/x.png", "c/deep/er/y.webp", "c/z.jpg", *odd], start=5):
        image(folder / name, height)
    (folder / "d").mkdir()
    (folder / "c" / "notes.rst").write_text("no image")
    image(tmp_path / "elsewhere" / "one.jpg", 30)
    (folder / "e").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "one.jpg")
    return folder


def state(source):
    """All that a run takes from a source."""
    source.open()
    labels = None if source.labels is None else (source.labels.tolist(), source.labels.dtype)
    sizes = source.sizes.tolist(), source.sizes.dtype
    lengths = source.names.lengths.tolist()
    some = np.array([len(source) - 1, 0, len(source) - 1])
    assert np.array_equal(source.sizes_of(some), source.sizes[some])
    assert labels is None or source.labels_of(some).tolist() == source.labels[some].tolist()
    return list(source.names), labels, source.class_names, list(source.remarks), sizes, lengths, source.identity()


def not_walked(monkeypatch):
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("listed again"))
    monkeypatch.setattr(index, "size_of", lambda *_: pytest.fail("sizes read again"))


def sources(root, tmp_path):
    lines = [f"{name} {i}\n" for i, name in enumerate(["b/ü.jpg", "a/x.png", os.fsdecode(b"b/\xff\xfe.jpg")])]
    (tmp_path / "list.txt").write_text("".join(lines), errors="surrogateescape")
    (tmp_path / "classes.txt").write_text("e\na\n")
    (tmp_path / "train.json").write_text(
        '{"images": [{"id": 7, "file_name": "c/z.jpg"}], "annotations": [{"image_id": 7, "category_id": 3}]}'
    )
    yield lambda: ImageFolder(str(root))
    yield lambda: ImageFolder(str(root / "b"))  # flat
    yield lambda: ImageList(str(root), str(tmp_path / "list.txt"))
    yield lambda: ImageNet(str(root))
    yield lambda: ImageNet(str(root), str(tmp_path / "data/imagenet/meta/train.txt"))  # which does not exist
    yield lambda: ImageNet100(str(root), str(tmp_path / "classes.txt"))
    yield lambda: Places205(str(root))
    yield lambda: INaturalist2018(str(root), str(tmp_path / "train.json"))


def test_what_is_kept_equals_what_is_listed_anew(root, tmp_path, monkeypatch):
    for make in sources(root, tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(kept, "_place", lambda _: None)
            anew = state(make())
        first = state(make())
        with monkeypatch.context() as patch:
            not_walked(patch)
            source = make()
            assert anew == first == state(source), repr(source)
            assert source.names.kept is not None


def mapped_mib(path):
    """Memory of this process that holds pages of a file."""
    parts = re.findall(rf"{re.escape(str(path))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert parts
    return sum(map(int, parts)) / 1024


def test_sizes_and_labels_of_some_samples_map_no_pages(tmp_path):
    count = 2**20
    generator = np.random.default_rng(0)
    columns = {"labels": np.arange(count), "sizes": generator.integers(1, 9999, (count, 2), dtype=np.int32)}
    table.write(tmp_path / "a.names", columns, {})
    kept_table = table.load(tmp_path / "a.names")
    assert kept_table is not None and kept_table.is_mapped and not table.Table(columns, {}).is_mapped
    kept_table.drop_pages()
    ids = generator.integers(0, count, 10_000)
    before = mapped_mib(tmp_path / "a.names")
    found = {name: kept_table.rows(name, ids) for name in columns}
    assert mapped_mib(tmp_path / "a.names") - before < 0.5
    for name, column in columns.items():
        assert np.array_equal(found[name], column[ids]) and found[name].dtype == column.dtype
        assert np.array_equal(kept_table.columns[name][ids], column[ids])
        assert kept_table.rows(name, ids[:0]).shape == column[:0].shape
    assert mapped_mib(tmp_path / "a.names") - before > 10


def test_a_size_that_is_entered_is_given_where_sizes_are_kept(root):
    (root / "a" / "broken.jpg").write_bytes(b"no image")
    for _ in range(2):
        source = ImageFolder(str(root))
        source.open()
        sample = source.names.index(str(root / "a" / "broken.jpg"))
        assert source.sizes_of(np.array([sample])).tolist() == [[0, 0]]
        assert source.set_size(sample, (3, 4))
        assert source.sizes_of(np.array([sample, 0])).tolist() == [[3, 4], source.sizes[0].tolist()]


def with_the_old_time(folder, change):
    before = folder.stat().st_mtime_ns
    change()
    os.utime(folder, ns=(before, before))


def rewritten(path, content):
    path.write_bytes(content)
    os.utime(path, (1, 1))


CHANGES = {
    "added": lambda root: image(root / "c/deep/er/new.jpg"),
    "removed": lambda root: (root / "c/z.jpg").unlink(),
    "renamed": lambda root: (root / "c/z.jpg").rename(root / "c/zz.jpg"),
    "replaced by another name": lambda root: ((root / "c/z.jpg").unlink(), image(root / "c/y.jpg", 7)),
    "added, with the folder's old time": lambda root: with_the_old_time(root / "c", lambda: image(root / "c/y.jpg")),
    "class added": lambda root: (root / "f").mkdir(),
    "link led elsewhere": lambda root: ((root / "e").unlink(), (root / "e").symlink_to(root.parent / "list")),
    "added behind a link": lambda root: image(root.parent / "elsewhere/two.jpg"),
    "written in place": lambda root: rewritten(root / "c/z.jpg", (root / "e/one.jpg").read_bytes()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, root, monkeypatch):
    image(root.parent / "list" / "other.jpg")
    before = state(ImageFolder(str(root)))
    CHANGES[change](root)
    after = state(ImageFolder(str(root)))
    monkeypatch.setattr(kept, "_place", lambda _: None)
    assert after != before and after == state(ImageFolder(str(root)))


def test_a_folder_behind_a_broken_link_is_noticed_when_it_comes(root):
    (root / "disk").symlink_to(root.parent / "mounted")
    before = state(ImageFolder(str(root)))
    image(root.parent / "mounted" / "1.jpg")
    assert "disk" in state(ImageFolder(str(root)))[2] and "disk" not in before[2]


def test_a_list_that_appears_is_used(root, tmp_path):
    ann_file = tmp_path / "data/imagenet/meta/train.txt"
    before = state(ImageNet(str(root), str(ann_file)))
    ann_file.parent.mkdir(parents=True)
    ann_file.write_text("c/z.jpg 4\n")
    assert len(before[0]) > 1 and state(ImageNet(str(root), str(ann_file)))[1][0] == [4]


def test_a_resumed_run_looks_at_every_file_and_a_new_one_at_some(tmp_path, monkeypatch):
    for i in range(300):
        image(tmp_path / f"{i:03d}.png")
    monkeypatch.setattr(file_sizes, "LOOKED_AT", 128)
    before = state(ImageFolder(str(tmp_path)))
    monkeypatch.setattr(file_sizes, "_some", lambda _: np.arange(128))
    rewritten(tmp_path / "299.png", (image(tmp_path.parent / "x.png", 20, 30)).read_bytes())
    assert state(ImageFolder(str(tmp_path))) == before
    source = ImageFolder(str(tmp_path))
    source.open()
    source.look_at_all()
    assert source.sizes[299].tolist() == [20, 30] and source.identity() != before[-1]
    assert state(ImageFolder(str(tmp_path)))[-1] == source.identity()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 575, 576, 577, 9000])
def test_results_come_in_order_whoever_reads(count, monkeypatch):
    def read_by(quick_s):
        monkeypatch.setattr(index, "_QUICK_S", quick_s)
        readers = set()

        def read(ids):
            readers.add(threading.current_thread().name)
            time.sleep(1e-5 * len(ids))
            return ids.tolist()

        threads = waiting.Threads(index.THREADS, "many")
        parts = list(index.in_parts(threads, read, np.arange(count), waiting.Wait()))
        threads.close()
        assert [i for part in parts for i in part] == list(range(count)) and all(parts)
        return readers

    assert read_by(10.0) <= {"sslrun-index"}
    assert ("many" in read_by(0.0)) == (count > 576), "two parts are ahead"


def test_some_files_are_looked_at_in_runs():
    ids = file_sizes._some(1_000_000)
    assert len(np.unique(ids)) == len(ids) == file_sizes.LOOKED_AT and ids.min() >= 0 and ids.max() < 1_000_000
    assert not np.array_equal(ids, file_sizes._some(1_000_000))
    assert np.array_equal(file_sizes._some(1000), np.arange(1000))


def test_a_size_that_is_entered_stays_in_this_process(root):
    before = state(ImageFolder(str(root)))
    source = ImageFolder(str(root))
    source.open()
    assert source.sizes.tolist() == before[4][0] and source.set_size(0, (70, 80))
    assert source.identity() != before[-1]
    assert state(ImageFolder(str(root))) == before


def test_new_folders_are_listed_again(root, monkeypatch):
    monkeypatch.setattr(seen, "SETTLED_S", 1000)
    source = ImageFolder(str(root))
    source.open()
    assert source.names.kept is None


def test_no_images_are_an_error_each_time(tmp_path):
    for _ in range(2):
        with pytest.raises(UsageError, match="has no images"):
            ImageFolder(str(tmp_path)).open()


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "without its first byte": lambda content: content[1:],
    "zeros": lambda content: bytes(len(content)),
    "another first byte": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "another byte in the middle": lambda content: content[: (m := len(content) // 2)] + b"?" + content[m + 1 :],
    "another length of the description": lambda content: content[:-27] + bytes(range(8)) + content[-19:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_made_anew(damage, root, cache):
    before = state(ImageFolder(str(root)))
    for file in [*(cache / "index").glob("*.names"), *(cache / "index").glob("*.sizes")]:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        assert table.load(file) is None
        assert state(ImageFolder(str(root))) == before
        assert table.load(file) is not None


def test_a_cache_that_cannot_be_written_costs_time_only(root, tmp_path, monkeypatch, caplog):
    before = state(ImageFolder(str(root)))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, logger="sslrun"):
        assert state(ImageFolder(str(root))) == before
    assert caplog.text.count("not kept") == 1


def test_a_full_disk_costs_time_only(root, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="sslrun"):
        patch.setattr(os, "fsync", full)
        first = state(ImageFolder(str(root)))
    assert "No space left" in caplog.text and state(ImageFolder(str(root))) == first


START = """
import sys, time
from sslrun.data import index
from sslrun.data.sources import file_sizes, kept, seen
from sslrun.data.sources.image_folder import ImageFolder
seen.SETTLED_S = -1e6
size_of = index.size_of
def slow(source, sample):
    print("reads", flush=True)
    time.sleep(float(sys.argv[2]))
    return size_of(source, sample)
index.size_of = slow
source = ImageFolder(sys.argv[1])
source.open()
source.sizes
print(source.identity(), flush=True)
"""


def started(root, pause_s):
    engine = Path(kept.__file__).parents[3]
    paths = os.pathsep.join([str(engine), str(engine.parent / "kernels")])
    command = [sys.executable, "-c", START, str(root), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})


def test_of_two_processes_one_reads(root):
    outputs = [process.communicate()[0].split() for process in [started(root, 0.3), started(root, 0.3)]]
    count = len(state(ImageFolder(str(root)))[0])
    assert sorted(output.count("reads") for output in outputs) == [0, count]
    assert outputs[0][-1] == outputs[1][-1] == identity_of(root)


def refused(monkeypatch, path, number, times=float("inf"), among=("open",)):
    """Accesses to a path fail: that many."""
    left = {"times": times}

    def wrapped(original):
        def call(at, *arguments, **options):
            if isinstance(at, (str, os.PathLike)) and os.fspath(at) == str(path) and left["times"] > 0:
                left["times"] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return original(at, *arguments, **options)

        return call

    for name in among:
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_may_not_be_read_any_more_is_an_error(is_kept, root, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("c/z.jpg 4\n")
    makers = {
        tmp_path / "list.txt": lambda: ImageList(str(root), str(tmp_path / "list.txt")),
        root / "c": lambda: ImageFolder(str(root)),
    }
    for path, make in makers.items():
        if is_kept:
            state(make())
        with monkeypatch.context() as patch:
            refused(patch, path, errno.EACCES)
            with pytest.raises(UsageError, match=f"{path}: Permission denied"):
                make().open()


def test_a_kept_list_whose_storage_gives_errors_is_waited_for(root, monkeypatch):
    before = state(ImageFolder(str(root)))
    monkeypatch.setattr(durable, "FIRST_PAUSE_S", 0.01)
    with monkeypatch.context() as patch:
        refused(patch, root / "c", errno.EIO, times=2)
        not_walked(patch)
        assert state(ImageFolder(str(root))) == before
    monkeypatch.setattr(durable, "RETRY_S", 0.1)
    refused(monkeypatch, root / "c", errno.EIO)
    with pytest.raises(RunFailed, match="Input/output error"):
        ImageFolder(str(root)).open()


def test_a_folder_that_is_gone_is_an_error_where_a_list_is_kept(root, tmp_path):
    (tmp_path / "list.txt").write_text("c/z.jpg 4\n")
    state(ImageList(str(root), str(tmp_path / "list.txt")))
    root.rename(tmp_path / "other")
    with pytest.raises(UsageError, match="does not exist"):
        ImageList(str(root), str(tmp_path / "list.txt")).open()


@pytest.mark.parametrize("times", [1, float("inf")])
def test_a_file_that_storage_does_not_tell_of_is_not_kept_as_missing(times, root, cache, monkeypatch):
    with monkeypatch.context() as patch:
        refused(patch, root / "c/z.jpg", errno.EIO, times, among=("stat",))
        first = state(ImageFolder(str(root)))
    second = state(ImageFolder(str(root)))
    for file in (cache / "index").iterdir():
        file.unlink()
    clean = state(ImageFolder(str(root)))
    assert second == clean and (first == clean) == (times == 1)


def test_a_plan_writes_nothing_and_uses_what_is_kept(root, cache, monkeypatch):
    source = ImageFolder(str(root))
    source.make_nothing()
    source.open()
    assert not any(cache.iterdir())
    before = state(ImageFolder(str(root)))
    kept_files = {file: file.stat().st_mtime_ns for file in (cache / "index").iterdir()}
    not_walked(monkeypatch)
    monkeypatch.setattr(table, "locked", lambda *_: pytest.fail("a lock is taken"))
    again = ImageFolder(str(root))
    again.make_nothing()
    again.open()
    assert list(again.names) == before[0] == list(source.names)
    assert {file: file.stat().st_mtime_ns for file in (cache / "index").iterdir()} == kept_files


def test_of_a_changed_list_only_new_files_are_read(root, monkeypatch):
    state(ImageFolder(str(root)))
    image(root / "b/another.jpg", 40)
    rewritten(root / "c/z.jpg", (root / "e/one.jpg").read_bytes())
    (root / "a/x.png").unlink()
    read, size_of = [], index.size_of
    monkeypatch.setattr(index, "size_of", lambda source, i: (read.append(source.names[i]), size_of(source, i))[1])
    found = state(ImageFolder(str(root)))
    assert sorted(read) == [str(root / "b/another.jpg"), str(root / "c/z.jpg")]
    monkeypatch.setattr(kept, "_place", lambda _: None)
    assert found == state(ImageFolder(str(root)))


def test_another_version_of_the_code_lists_anew(root, monkeypatch):
    before = state(ImageFolder(str(root)))
    monkeypatch.setattr(kept, "_code", lambda: "newer")
    with monkeypatch.context() as patch:
        not_walked(patch)
        with pytest.raises(pytest.fail.Exception, match="listed again"):
            ImageFolder(str(root)).open()
    assert state(ImageFolder(str(root))) == before


def test_file_systems_whose_folders_have_no_times_are_listed_anew(root, tmp_path, monkeypatch):
    device = os.stat(root).st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / / rw shared:1 - {{}} source rw\n"
    monkeypatch.setattr(seen, "_MOUNTS", str(tmp_path / "mounts"))
    for kind, is_kept in {"fuse.gcsfuse": False, "fuse": False, "ext4": True, "fuseblk": True}.items():
        (tmp_path / "mounts").write_text(line.format(kind))
        source = ImageFolder(str(root))
        source.open()
        assert (source.names.kept is not None) == is_kept
        for file in kept.cache_dir().rglob("*.names"):
            file.unlink()


def test_a_large_new_folder_is_kept_after_a_pause(root, monkeypatch):
    monkeypatch.setattr(seen, "SETTLED_S", 1.0)
    monkeypatch.setattr(kept, "SMALL", 5)
    image(root / "new.jpg")
    source = ImageFolder(str(root))
    source.open()
    assert source.names.kept is not None


def test_what_is_left_beside_a_table(tmp_path):
    path = tmp_path / "a.names"
    (tmp_path / "a.names.1.tmp").write_bytes(b"another machine writes")
    for i in range(6):
        table.write(path, {"x": np.arange(i)}, {})
    assert len(list(tmp_path.glob("*.old"))) <= 4, "for processes of other machines"
    assert len(list(tmp_path.glob("*.tmp"))) == 1 and len(table.load(path).columns["x"]) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_DAY_S", -1)
        table.write(path, {"x": np.arange(7)}, {})
    assert len(list(tmp_path.glob("*.old"))) == 1 and not list(tmp_path.glob("*.tmp"))


def identity_of(root):
    source = ImageFolder(str(root))
    source.open()
    return source.identity()


def test_a_process_that_is_killed_leaves_nothing_in_the_way(root, cache):
    process = started(root, 60)
    assert process.stdout.readline() == "reads\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((cache / "index").glob("*.sizes"))
    assert len(state(ImageFolder(str(root)))[0]) > 0
    assert list((cache / "index").glob("*.sizes"))


def test_a_table_that_was_being_written_is_none(tmp_path):
    path = tmp_path / "a.names"
    table.write(path, {"x": np.arange(5), "empty": np.empty((0, 2), np.int32)}, {"name": os.fsdecode(b"\xff")})
    (tmp_path / "a.names.tmp").write_bytes(b"half")
    found = table.load(path)
    assert found.columns["x"].tolist() == [0, 1, 2, 3, 4] and found.columns["empty"].shape == (0, 2)
    assert found.about["name"] == os.fsdecode(b"\xff")
    found.columns["x"][0] = 9
    assert table.load(path).columns["x"][0] == 0
