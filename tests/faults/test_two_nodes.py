"""The commands of "Two nodes" in docs/cluster.md, executed for two nodes that are both this machine, a rank on each."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import documents
import small_run
from sslrun.runtime.run_files import RunFiles

PAGE = small_run.ROOT / "docs/cluster.md"
SETTINGS = {"slots=8": "slots=1", "nodeA": "127.0.0.1", "nodeB": "localhost", "per-node 8": "per-node 1"}


def blocks(language: str, word: str) -> list[str]:
    """The blocks of the page's section that have a word, for one rank on each of two nodes that are this machine."""
    found = [b.text for b in documents.blocks(PAGE) if b.language == language and word in b.text]
    for old, new in SETTINGS.items():
        found = [text.replace(old, new) for text in found]
    return found


def command(text: str, node: int, port: int, recipe: Path) -> list[str]:
    text = re.sub(r"\bR\b", str(node), re.sub(r"\bA\b", "127.0.0.1", text)).replace("29500", str(port))
    program, *words = text.split()
    script = str(small_run.ROOT / "bin/sslrun")
    places = {"bin/sslrun": script, "configs/mocov2.toml": str(recipe)}
    return [str(Path(sys.executable).parent / program), *(places.get(word, word) for word in words)]


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_train_one_run(launcher, tmp_path, images):
    (hosts,), (text,) = blocks("text", "slots"), blocks("bash", f"{launcher} -")
    (tmp_path / "hosts").write_text(hosts)
    recipe, port = small_run.write_recipe(tmp_path, images, steps=4), small_run.free_port()
    nodes, outputs = [], [tmp_path / f"node{node}" for node in (0, 1)]
    for node, output in enumerate(outputs):
        with open(output, "w") as file:
            words = command(text, node, port, recipe)
            options = {"cwd": tmp_path, "env": small_run.environment(), "start_new_session": True}
            nodes.append(subprocess.Popen(words, stdout=file, stderr=file, **options))
    deadline = time.monotonic() + 240
    while any(node.poll() is None for node in nodes) and not any(node.returncode for node in nodes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for node in nodes:  # a launcher that gets the signal ends its rank; the rank would notice the launcher's end
        node.terminate()
    codes, printed = [node.wait(60) for node in nodes], [output.read_text() for output in outputs]
    assert codes == [0, 0], printed
    run = RunFiles(tmp_path / "runs/small")
    assert run.status() == "done" and "on 2 x cpu" in (run.path / "log.txt").read_text()
    assert "done: " in printed[0] and "done: " not in printed[1], "rank 0 is on node 0"
