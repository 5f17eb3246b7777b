"""The commands of docs/configs.md, executed in an empty folder."""

import small_run
from documents import follow

DOCUMENT = small_run.ROOT / "docs" / "configs.md"


def test_every_file_and_command_of_the_tutorial(tmp_path):
    follow(DOCUMENT, tmp_path)
