"""docs/reference.md: current, complete, and with valid links."""

import re
from html.parser import HTMLParser

import markdown
import pytest

from sslrun.config.dump import inline
from sslrun.config.reference import anchor, reference
from sslrun.config.schema import REFERENCE_PATH
from sslrun.config.schema_reader import classes, committed_schema, keys, kinds, places

SCHEMA = committed_schema()
TEXT = reference(SCHEMA)
DEFINITIONS = SCHEMA["$defs"]
TABLES = {name: table for name, table in DEFINITIONS.items() if "properties" in table}


class Page(HTMLParser):
    """The rendered page: headings with the text and list items below them, and link targets."""

    def __init__(self, text):
        super().__init__()
        self.links, self.headings, self.below, self.items, self.stack = [], [], {}, {}, []
        self.feed(markdown.markdown(text, extensions=["tables"]))

    def handle_starttag(self, tag, attributes):
        self.stack.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "li":
            self.items.setdefault(self.headings[-1], []).append("")
        self.links += [value for name, value in attributes if name == "href"]

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, data):
        if {"h1", "h2", "h3"} & set(self.stack):
            self.headings[-1] += data
            return
        heading = self.headings[-1]
        self.below[heading] = self.below.get(heading, "") + data
        if "li" in self.stack:
            self.items[heading][-1] += data


PAGE = Page(TEXT)


def words(text):
    return " ".join(text.split())


def heading_of(name):
    """The heading of a table. Export formats that have the name of a backbone say that they are formats."""
    if "x-module" in TABLES[name]:
        title = TABLES[name]["title"]
        return f"{title} (formats)" if title in ("Timm", "Torchvision") else title
    if name == "Scheduled":  # at the keys of many numbers
        return "A number with a schedule"
    key = places(SCHEMA)[name][0]
    table = ".".join(map(str, key[:-1] if key[-1:] == ("N",) else key))
    return f"[[{table}]]" if key[-1:] == ("N",) else f"[{table}]" if key else "The recipe"


def test_the_committed_document_is_current():
    assert REFERENCE_PATH.read_text() == TEXT, "make schema"


def test_headings_and_the_links_to_them():
    anchors = [anchor(heading) for heading in PAGE.headings]
    assert len(set(anchors)) == len(anchors), "GitHub numbers equal ones, and links lead to the first"
    inside = {link[1:] for link in PAGE.links if link.startswith("#")}
    assert inside <= set(anchors)
    assert set(anchors) - inside == {"reference"}, "everything is in the contents"
    files = {link for link in PAGE.links if not link.startswith("#")}
    assert len(files) > 20 and all((REFERENCE_PATH.parent / link).is_file() for link in files)


@pytest.mark.parametrize(
    ("heading", "expected"), [("`[[data.views]]`", "dataviews"), ("The recipe", "the-recipe"), ("`[a.b_c]`", "ab_c")]
)
def test_anchors_are_githubs(heading, expected):
    assert anchor(heading) == expected


def test_every_table_has_all_that_the_schema_has():
    """In the rendered page: no sentence is mistaken for a list, a link or emphasis."""
    for name, table in TABLES.items():
        twin = TABLES.get(table["title"]) if "x-module" in table else None
        if twin is None:
            check_table(table, heading_of(name))
        else:  # an evaluation, described where its table in [eval] is
            assert keys(twin) == keys(table)
            assert words(PAGE.below[heading_of(name)]).startswith(f"Described at {heading_of(table['title'])}. Code: ")


def check_table(table, heading):
    below = words(PAGE.below[heading])
    assert below.startswith(words(table["description"]).replace("`", ""))
    for paragraph in table.get("x-docs", "").split("\n\n"):
        assert words(paragraph).replace("`", "") in below
    items = PAGE.items.get(heading, [])
    assert len(items) == len(keys(table))
    for item, (key, asked) in zip(items, keys(table).items(), strict=True):
        has_default = asked.get("default", {}) != {}
        assert item.startswith(f"{key} = {inline(asked['default'])} (" if has_default else f"{key} (")
        assert words(item).endswith("): " + asked["description"].replace("`", ""))
        assert ("; required)" in words(item)) == (key in table["required"])


def test_every_kind_lists_its_keys_and_classes():
    for kind, union in kinds(SCHEMA).items():
        below = words(PAGE.below[kind.capitalize()])
        where = "Named on the command line" if kind == "formats" else f"Named by {union['x-tag']} at "
        assert below.startswith(where)
        assert all(re.search(rf"\b{name}\b", below) for name in classes(union))
    assert "Named by type at data.source, data.source.source, data.holdout, eval.train, eval.test." in words(
        PAGE.below["Sources"]
    )
    assert "Named by policy at lr, eval.finetune.lr" in words(PAGE.below["Schedules"])
    for kind, key in (("Monitors", "monitor.extra.N"), ("Hooks", "log.hooks.N"), ("Evaluations", "eval.extra.NAME")):
        assert f"Named by type at {key}." in words(PAGE.below[kind])


def test_lines_have_at_most_120_characters():
    assert max(len(line) for line in TEXT.splitlines() if not line.startswith("|")) <= 120
