"""The mistakes of docs/reliability.md, as data: what is done wrong, and how."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import small_run
from ranks import run_ranks
from small_run import ROOT
from sslrun.runtime import checkpoint

Made = Callable[[Path], tuple[int, str]]


@dataclass(frozen=True)
class Mistake:
    """One row of the table. The folder HERE holds `mine.toml`, `images/`, and `runs/done`, the run of `done.toml`.

    Attributes:
        name: the mistake, in the words of the table.
        words: command line after `bin/sslrun`, started in HERE.
        prepare: makes the mistake's files in HERE.
        made: in place of the command line: makes the mistake, and returns (exit code, output).
        nightly: whether it is too slow for the day.
    """

    name: str
    words: str = ""
    prepare: Callable[[Path], object] = lambda here: None
    made: Made | None = None
    nightly: bool = False


def edited(old: str, new: str) -> Callable[[Path], object]:
    """Changes a word of the recipe."""

    def edit(here: Path) -> None:
        text = (here / "mine.toml").read_text()
        assert old in text
        (here / "mine.toml").write_text(text.replace(old, new))

    return edit


def in_ranks(words: str, ranks: int = 1, absent: str = "", settings: Mapping[str, str] | None = None) -> Made:
    """The command in processes of their own, where a module cannot be imported; rank 0's code and output."""

    def make(here: Path) -> tuple[int, str]:
        return run_ranks(_without, ranks, words.split(), here, dict(settings or {}), absent)[0]

    return make


def _without(words: list[str], here: Path, settings: dict[str, str], absent: str) -> tuple[int, str]:
    if absent:
        sys.modules[absent] = None  # type: ignore[assignment]
    return small_run._answer(words, here, settings)


def damaged(here: Path) -> None:
    for path in checkpoint.steps(here / "runs/done/checkpoints").values():
        os.truncate(path / "model.safetensors", 100)


def of_another_version(here: Path) -> None:
    manifest = small_run.saved(here / "runs/done", 6) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))


def unreadable(here: Path) -> None:
    for image in sorted((here / "images/class_1").iterdir())[:5]:
        image.write_bytes(image.read_bytes()[:100] + bytes(600))


def unlabeled(here: Path) -> None:
    for image in sorted((here / "images").rglob("*.jpg")):
        image.rename(here / "images" / f"{image.parent.name}_{image.name}")
    for folder in (here / "images").iterdir():
        if folder.is_dir():
            folder.rmdir()


def fewer(here: Path) -> None:
    for image in sorted((here / "images/class_0").iterdir())[:4]:
        image.unlink()


def a_list(here: Path) -> None:
    names = [f"class_{label}/{number:02d}.jpg {label}\n" for label in range(4) for number in range(20)]
    (here / "list.txt").write_text("".join(names).replace("class_2/07", "class_2/7"))


def in_use(here: Path) -> tuple[int, str]:
    code = "import sys, time; from pathlib import Path; from sslrun.runtime import folder_lock\n"
    code += "folder_lock.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    holder = small_run.python(code, here / "runs/done")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        return small_run.answer(["done.toml", "--resume"], here)
    finally:
        holder.kill()
        holder.wait()


def _training(here: Path) -> "subprocess.Popen[str]":
    process = small_run.start(small_run.command(here / "mine.toml", "--set", "max_iters=100000"))
    small_run.wait_until(lambda: small_run.last_step(here / "runs/mine") >= 3, process)
    return process


def out_of_memory(here: Path) -> tuple[int, str]:
    """What the kernel's OOM killer does is a SIGKILL."""
    process = _training(here)
    process.kill()
    process.communicate()
    return small_run.answer(["runs", "--wait", "runs/mine"], here)


def bare_python(here: Path) -> tuple[int, str]:
    """A checkout without `make install`, and a Python without torch."""
    script = here / "sslrun/bin/sslrun"
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / "bin/sslrun").read_text())
    (here / "sslrun/engine").symlink_to(ROOT / "engine")
    words = [sys.executable, "-I", "-S", str(script), "mine.toml"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout.replace(sys.executable, "/usr/bin/python3")


LIST = "--set data.source={type='ImageList',data_prefix='images',ann_file='list.txt',_delete_=true}"
TENSORBOARD = "mine.toml --set log.hooks=[{type='TensorBoard'}]"

MISTAKES = [
    # the recipe
    Mistake("a misspelled key", "mine.toml", edited("queue_len", "queue_lenght")),
    Mistake("a misspelled key in `--set`", "mine.toml --set optimizer.weight_deacy=0"),
    Mistake("a letter in a number", "mine.toml --set max_iters=1O0"),
    Mistake("two values after one `--set`", "mine.toml --set seed=1 max_iters=5"),
    Mistake("a misspelled class", "mine.toml", edited('"ResNet"', '"Resnet50"')),
    Mistake("a key of MMSelfSup", "mine.toml --set lr_config.policy=CosineAnnealing"),
    Mistake(
        "a config of MMSelfSup", "old.py", lambda here: (here / "old.py").write_text("model = dict(type='MoCo')\n")
    ),
    Mistake("a recipe that does not exist", "mien.toml"),
    Mistake("a base that does not exist", "mine.toml", edited("global_batch", 'extends = "base.toml"\nglobal_batch')),
    Mistake("`epochs` and `max_iters`", "mine.toml --set epochs=5"),
    Mistake("an environment variable that is not set", "mine.toml --set data.source.data_prefix=${env:IMAGES}/train"),
    # the images
    Mistake("a wrong path of the images", "mine.toml --set data.source.data_prefix=imagse"),
    Mistake(
        "a folder without images", "mine.toml --set data.source.data_prefix=new", lambda here: (here / "new").mkdir()
    ),
    Mistake("k-NN for images without classes", "mine.toml", unlabeled),
    Mistake("a label file that does not exist", f"mine.toml {LIST}"),
    Mistake("a label file with a name that does not exist", f"mine.toml {LIST}", a_list, nightly=True),
    Mistake("images cut short by a copy", "mine.toml", unreadable, nightly=True),
    Mistake("fewer images than one batch", "mine.toml --set global_batch=800"),
    # machines
    Mistake("a batch that is no multiple of its BatchNorm groups", "mine.toml --set global_batch=20"),
    Mistake(
        "a batch that the processes cannot share",
        made=in_ranks("mine.toml --dry-run", settings={"RANK": "0", "WORLD_SIZE": "3"}),
        nightly=True,
    ),
    Mistake("no GPU where the recipe asks for one", "mine.toml --set engine.device=cuda"),
    Mistake("a Python without torch", made=bare_python),
    Mistake("TensorBoard is not installed", made=in_ranks(TENSORBOARD, absent="tensorboard"), nightly=True),
    Mistake("DALI is not installed", made=in_ranks("mine.toml", absent="nvidia.dali"), nightly=True),
    Mistake("DeepSpeed is not installed", made=in_ranks("mine.toml", ranks=2, absent="deepspeed"), nightly=True),
    # runs and checkpoints
    Mistake("the same command again", "done.toml"),
    Mistake("`--resume` of a run that is done", "done.toml --resume"),
    Mistake("`--resume` with another learning rate", "done.toml --resume --set optimizer.lr=0.1"),
    Mistake("`--resume` with fewer images", "done.toml --resume --set max_iters=9", fewer),
    Mistake("`--resume` while the run goes on", made=in_use, nightly=True),
    Mistake("every checkpoint is damaged", "done.toml --resume", damaged),
    Mistake("a wrong path of a checkpoint", "mine.toml --resume=runs/dnoe"),
    Mistake(
        "a checkpoint of another version", "done.toml --resume=runs/done/checkpoints/step_00000006", of_another_version
    ),
    Mistake("a checkpoint of another model", "mine.toml --resume=runs/done --set model.queue_len=80"),
    Mistake("weights of another model", "mine.toml --set load_from=runs/done --set model.queue_len=80"),
    Mistake("weights that do not exist", "mine.toml --set load_from=weights.pth"),
    Mistake("a `work_dir` that is no folder", "mine.toml --work-dir done.toml"),
    # while it runs
    Mistake(
        "a learning rate that is far too high",
        "mine.toml --set optimizer.lr=1e30 --set engine.max_skipped_steps=1",
        nightly=True,
    ),
    Mistake("features that collapse", "mine.toml --set monitor.collapse=stop --set max_iters=12", nightly=True),
    Mistake("killed for its memory; then `runs --wait`", made=out_of_memory, nightly=True),
    # results
    Mistake("an evaluation of a folder that is no run", "eval knn images"),
    Mistake("`runs` in the wrong folder", "runs work_dirs"),
]
