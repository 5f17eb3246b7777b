"""From annotations to a schema, the errors of the checker, built objects, and `explain`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sslrun.config import Component, load
from sslrun.config.annotations import describe, parameters
from sslrun.config.dump import inline
from sslrun.config.explain import explain, explain_all
from sslrun.config.node import show, walk
from sslrun.config.schema_reader import committed_schema
from sslrun.errors import UsageError

ROOT = Path(__file__).parents[1]
ALIASES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").glob("*.toml"))]


class Net(Component, kind="nets"):
    """Anything with layers."""


class Linear(Net):
    """A linear layer.

    Args:
        in_channels: width that enters,
            in features.
        bias (bool): whether a bias is added.
    """

    def __init__(self, in_channels: int, bias: bool = True) -> None:
        self.in_channels, self.bias = in_channels, bias


class Stack(Net):
    """Layers in a row.

    More about them.

        even in columns

    Args:
        layers: the layers.
        scale: factors, low and high.
        dropout: probability; True is refused.
    """

    def __init__(self, layers: list[Net], scale: tuple[float, float] = (0.0, 1.0), dropout: float = 0.0) -> None:
        if dropout >= 1:
            raise ValueError(f"dropout is {dropout}, expected below 1")
        self.layers, self.scale, self.dropout = layers, scale, dropout


class Scaled(Linear):
    """A linear layer times a number.

    Args:
        factor: the number.
        bias: here without one by default.
    """

    def __init__(self, factor: float, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(bias=bias, **kwargs)
        self.factor = factor


class Frozen(Net, listed=False):
    """Made by code only."""


class Plan(Component, kind="plans", tag="policy"):
    """When to do what."""


class Step(Plan):
    """At milestones.

    Args:
        step: milestones.
    """

    def __init__(self, step: list[int]) -> None:
        self.step = step


@dataclass
class Every(Plan):
    """At every n-th.

    Args:
        n: n.
    """

    n: int


@dataclass(frozen=True)
class Log:
    """What is written down.

    Attributes:
        interval: steps between rows.
        micro: samples at once.
    """

    interval: int = 50
    micro: Literal["auto"] | int = "auto"
    hooks: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["wandb"])


@dataclass
class Recipe:
    """A toy recipe.

    Attributes:
        net: the network.
        holdout: a network, or a share.
    """

    net: Net
    plan: Plan | None = None
    holdout: Net | float | None = None
    epochs: int | None = None
    max_iters: int | None = None
    log: Log = field(default_factory=Log)
    sizes: dict[str, int] = field(default_factory=dict)
    custom_imports: list[str] = field(default_factory=list)
    vars: dict[str, Any] = field(default_factory=dict)


@dataclass
class Odd:
    """Refuses odd seeds."""

    net: Net
    seed: int = 0

    def __post_init__(self):
        if self.seed % 2:
            raise ValueError(f"seed {self.seed} is odd")


SCHEMA = describe(Recipe)
LINEAR = 'net = { type = "Linear", in_channels = 8 }\n'


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The config of x.toml, which extends base.toml."""
    monkeypatch.chdir(tmp_path)

    def make(text, *overrides, base="", schema=SCHEMA):
        (tmp_path / "base.toml").write_text(base)
        (tmp_path / "x.toml").write_text(f'extends = "base.toml"\n{text}')
        return load("x.toml", overrides, schema)

    return make


@pytest.fixture
def refused(made):
    def refuse(text, *overrides, base=""):
        with pytest.raises(UsageError) as caught:
            made(text, *overrides, base=base)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


class TestDescribe:
    def test_a_component(self):
        assert SCHEMA["$defs"]["nets.Linear"] == {
            "title": "Linear",
            "description": "A linear layer.",
            "type": "object",
            "x-module": __name__,
            "properties": {
                "type": {"enum": ["Linear"], "description": "A linear layer."},
                "in_channels": {"type": "integer", "description": "width that enters, in features."},
                "bias": {"type": "boolean", "description": "whether a bias is added.", "default": True},
            },
            "required": ["type", "in_channels"],
            "additionalProperties": False,
        }

    def test_a_union_names_its_tag(self):
        options = [{"$ref": f"#/$defs/nets.{name}"} for name in ("Linear", "Scaled", "Stack")]
        assert SCHEMA["$defs"]["nets"] == {"title": "nets", "x-tag": "type", "oneOf": options}
        assert SCHEMA["$defs"]["plans"]["x-tag"] == "policy"

    def test_a_part_of_a_union_includes_the_whole_kind(self):
        found = describe(Linear)["$defs"]
        assert [option["$ref"] for option in found["nets:Linear"]["oneOf"]] == [
            "#/$defs/nets.Linear",
            "#/$defs/nets.Scaled",
        ]
        assert found["nets"] == SCHEMA["$defs"]["nets"]

    def test_kwargs_stand_for_the_constructor_above(self):
        found = parameters(Scaled)
        assert list(found) == ["factor", "bias", "in_channels"]
        assert found["bias"].default is False and found["bias"].description == "here without one by default."
        assert found["in_channels"].description == "width that enters, in features."

    def test_annotations(self):
        log, recipe = SCHEMA["$defs"]["Log"]["properties"], SCHEMA["$defs"]["Recipe"]["properties"]
        assert log["micro"]["anyOf"] == [{"enum": ["auto"]}, {"type": "integer"}]
        assert log["hooks"] == {"type": "array", "items": {"enum": ["tensorboard", "wandb"]}, "default": ["wandb"]}
        assert recipe["holdout"]["anyOf"] == [{"$ref": "#/$defs/nets"}, {"type": "number"}]
        assert recipe["sizes"] == {"type": "object", "additionalProperties": {"type": "integer"}, "default": {}}
        assert recipe["vars"]["additionalProperties"] == {}
        scale = {k: v for k, v in SCHEMA["$defs"]["nets.Stack"]["properties"]["scale"].items() if k != "description"}
        number = {"type": "number"}
        assert scale == {"type": "array", "items": number, "minItems": 2, "maxItems": 2, "default": (0.0, 1.0)}
        assert SCHEMA["$defs"]["Recipe"]["required"] == ["net"]

    def test_a_default_object_is_shown_as_the_table_that_builds_it(self):
        @dataclass
        class Defaults:
            """Tables.

            Attributes:
                log: all defaults.
                often: one of them changed.
                plan: a component.
            """

            log: Log = field(default_factory=Log)
            often: Log = field(default_factory=lambda: Log(interval=1))
            plan: Every = field(default_factory=lambda: Every(2))
            none: Log | None = None

        found = describe(Defaults)["$defs"]["Defaults"]["properties"]
        defaults = {key: asked.get("default") for key, asked in found.items()}
        assert defaults == {"log": {}, "often": {"interval": 1}, "plan": {"policy": "Every", "n": 2}, "none": None}

    def test_docs_are_the_text_after_the_first_paragraph(self):
        assert SCHEMA["$defs"]["nets.Stack"]["x-docs"] == "More about them.\n\n    even in columns"
        assert "x-docs" not in SCHEMA["$defs"]["nets.Linear"]

    def test_docstrings_of_modules_are_left_out_and_methods_name_their_papers(self):
        found = committed_schema()["$defs"]
        assert "x-docs" not in found["methods.SwAV"] and "x-docs" not in found["necks.LinearNeck"]
        methods = {name: table["description"] for name, table in found.items() if name.startswith("methods.")}
        assert len(methods) == len(list((ROOT / "engine/sslrun/methods").glob("[!_]*.py")))
        assert [name for name, text in methods.items() if "(arXiv " not in text] == ["methods.Supervised"]

    def test_annotations_without_a_toml_form_accept_anything(self):
        assert describe(Any) == {"$defs": {}} and describe(bytes) == {"$defs": {}}

    def test_two_components_with_the_same_name(self):
        with pytest.raises(TypeError, match=f"two nets are called Linear: {__name__} and elsewhere"):
            type("Linear", (Net,), {"__module__": "elsewhere"})


class TestCheck:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "x.toml:1: net is missing; Recipe needs it: a table whose type names one of the nets"),
            ("net = 3", "x.toml:2: net: expected a table whose type names one of the nets, got the number 3"),
            ("[net]\nbias = true", "x.toml:2: net: type is missing; it names one of the nets: Linear, Scaled, Stack"),
            ("[net]\ntype = 3", "x.toml:3: net.type: expected the name of a class, got the number 3"),
            ('[net]\ntype = "Liner"', "x.toml:3: net.type: there is no 'Liner' among the nets; did you mean Linear?"),
            (
                '[net]\ntype = "Convolution"',
                "x.toml:3: net.type: there is no 'Convolution' among the nets; known: Linear, Scaled, Stack; "
                "custom_imports makes your own classes known",
            ),
            (
                '[net]\ntype = "Frozen"',
                "x.toml:3: net.type: there is no 'Frozen' among the nets; known: Linear, Scaled, Stack; "
                "custom_imports makes your own classes known",
            ),
            (
                '\n\n[net]\ntype = "Linear"',
                "x.toml:4: net: in_channels is missing; Linear needs it: a whole number",
            ),
            (
                '[net]\ntype = "Linear"\nin_channels = true',
                "x.toml:4: net.in_channels: expected a whole number, got the boolean true",
            ),
            (
                '[net]\ntype = "Linear"\nin_channels = 8.0',
                "x.toml:4: net.in_channels: expected a whole number, got the number 8.0",
            ),
            (
                '[net]\ntype = "Linear"\nin_channels = 8\nbais = true',
                "x.toml:5: net.bais: unknown key of Linear; did you mean bias?",
            ),
            (
                '[net]\ntype = "Linear"\nin_channels = 8\nzzz = 1',
                "x.toml:5: net.zzz: unknown key of Linear; known: type, in_channels, bias",
            ),
            (
                '[net]\ntype = "Stack"\nlayers = [\n { type = "Linear", in_channels = 1 },\n { type = "Stack" },\n]',
                "x.toml:6: net.layers.1: layers is missing; Stack needs it: "
                "a list of tables whose type names one of the nets",
            ),
            (
                '[net]\ntype = "Stack"\nlayers = []\ndropout = false',
                "x.toml:5: net.dropout: expected a number, got the boolean false",
            ),
            (
                '[net]\ntype = "Stack"\nlayers = []\nscale = [0.1]',
                "x.toml:5: net.scale: expected a list of 2 numbers, got a list of 1",
            ),
            (
                '[net]\ntype = "Stack"\nlayers = []\nscale = [\n 1,\n "2",\n]',
                'x.toml:7: net.scale.1: expected a number, got the string "2"',
            ),
            (
                LINEAR + 'log.hooks = "wandb"',
                'x.toml:3: log.hooks: expected a list of "tensorboard" or "wandb", got the string "wandb"',
            ),
            (LINEAR + "nett = 1", "x.toml:3: nett: unknown key of Recipe; did you mean net?"),
            (LINEAR + "log.micro = 1.5", 'x.toml:3: log.micro: expected "auto" or a whole number, got the number 1.5'),
            (
                LINEAR + 'log.hooks = ["tensorbord"]',
                'x.toml:3: log.hooks.0: expected "tensorboard" or "wandb", got the string "tensorbord"',
            ),
            (
                LINEAR + "holdout = true",
                "x.toml:3: holdout: expected a table whose type names one of the nets or a number, "
                "got the boolean true",
            ),
            (
                LINEAR + 'holdout = { type = "Linear" }',
                "x.toml:3: holdout: in_channels is missing; Linear needs it: a whole number",
            ),
            (LINEAR + 'sizes = { a = 1, b = "x" }', 'x.toml:3: sizes.b: expected a whole number, got the string "x"'),
            (LINEAR + "plan.step = [1]", "x.toml:3: plan: policy is missing; it names one of the plans: Every, Step"),
            (
                LINEAR + 'plan = { policy = "step", step = [1] }',
                "x.toml:3: plan.policy: there is no 'step' among the plans; did you mean Step?",
            ),
            (
                LINEAR + "epochs = 2024-01-01",
                "x.toml:3: epochs: expected a whole number, got the date or time 2024-01-01",
            ),
        ],
    )
    def test_one_line_with_the_place(self, refused, text, expected):
        assert refused(text) == expected

    def test_errors_in_a_set(self, refused):
        text = refused(LINEAR, "log.intervall=5")
        assert text == "--set log.intervall=5: log.intervall: unknown key of Log; did you mean interval?"

    def test_a_reference_is_checked_by_its_value(self, refused):
        text = refused('[vars]\nn = "8"\n[net]\ntype = "Linear"\nin_channels = "${vars.n}"')
        assert text == 'x.toml:6: net.in_channels: expected a whole number, got the string "8"'

    def test_epochs_and_max_iters(self, refused, made):
        text = refused("max_iters = 5", base=LINEAR + "epochs = 3")
        assert text == (
            "x.toml:2: epochs and max_iters are both set, the other at base.toml:2; "
            '`_delete_ = ["epochs"]` or `_delete_ = ["max_iters"]` at the top of x.toml drops one'
        )
        config = made('_delete_ = ["epochs"]\nmax_iters = 5', base=LINEAR + "epochs = 3")
        assert config.values["max_iters"] == 5 and "epochs" not in config.values

    def test_an_unknown_class_may_come_from_custom_imports(self, made):
        values = made('custom_imports = ["my_net"]\nnet = { type = "Mine", anything = 1 }').values
        assert values["net"] == {"type": "Mine", "anything": 1}


BASE_STACK = '[net]\ntype = "Stack"\nlayers = []\ndropout = 0.1\n'


class TestChangedType:
    def test_inherited_keys_that_the_new_class_does_not_know(self, refused):
        assert refused('[net]\ntype = "Linear"\nin_channels = 8', base=BASE_STACK) == (
            "base.toml:3: net.layers: unknown key of Linear; known: type, in_channels, bias; it is inherited: "
            '`_delete_ = true` in [net] of x.toml drops all such keys, `_delete_ = ["layers"]` only this key'
        )

    def test_the_hint_works(self, made):
        config = made('[net]\n_delete_ = true\ntype = "Linear"\nin_channels = 8', base=BASE_STACK)
        assert config.values["net"] == {"type": "Linear", "in_channels": 8}
        assert config.notes == []
        config = made('[net]\n_delete_ = ["layers", "dropout"]\ntype = "Linear"\nin_channels = 8', base=BASE_STACK)
        assert config.values["net"] == {"type": "Linear", "in_channels": 8}

    def test_keys_that_the_new_class_knows_are_kept_with_a_note(self, made):
        config = made('[net]\ntype = "Scaled"\nfactor = 2', "net.factor=3", base=LINEAR)
        assert config.values["net"] == {"type": "Scaled", "in_channels": 8, "factor": 3}
        assert config.notes == [
            'x.toml:3: net.type: the string "Linear" was replaced by the string "Scaled"; '
            "kept from before: in_channels (base.toml:1)"
        ]

    def test_the_same_type_again_is_no_change(self, made):
        assert made('[net]\ntype = "Linear"', base=LINEAR).notes == []

    def test_a_kept_key_of_another_type(self, refused):
        base = '[plan]\npolicy = "Step"\nstep = 3\n'
        assert refused(LINEAR, base=base).endswith("plan.step: expected a list of whole numbers, got the number 3")
        base = '[net]\ntype = "Other"\nin_channels = [8]\n'
        assert refused('[net]\ntype = "Linear"', base=base) == (
            "base.toml:3: net.in_channels: expected a whole number, got a list; it is inherited: "
            '`_delete_ = true` in [net] of x.toml drops all such keys, `_delete_ = ["in_channels"]` only this key'
        )


class TestBuild:
    def test_nested_objects(self, made):
        layers = 'layers = [{ type = "Linear", in_channels = 1 }, { type = "Scaled", factor = 2, in_channels = 3 }]'
        config = made(f'[net]\ntype = "Stack"\nscale = [1, 2]\n{layers}\n[plan]\npolicy = "Step"\nstep = [3]\n')
        recipe = config.build(Recipe)
        assert type(recipe) is Recipe and type(recipe.net) is Stack
        assert recipe.net.scale == (1.0, 2.0) and all(type(x) is float for x in recipe.net.scale)
        assert [type(layer) for layer in recipe.net.layers] == [Linear, Scaled]
        assert recipe.net.layers[1].factor == 2.0 and recipe.net.layers[1].bias is False
        assert recipe.plan.step == [3] and recipe.log == Log() and recipe.epochs is None

    def test_unions_choose_the_type_that_fits(self, made):
        assert made(LINEAR + "holdout = 1\nlog.micro = 64").build(Recipe).holdout == 1.0
        recipe = made(LINEAR + 'holdout = { type = "Linear", in_channels = 2 }\nlog.micro = "auto"').build(Recipe)
        assert recipe.holdout.in_channels == 2 and recipe.log.micro == "auto"

    def test_a_part(self, made):
        config = made(LINEAR + "log = { interval = 5 }\nsizes = { a = 1 }")
        assert config.build(Net, "net").in_channels == 8
        assert config.build(Log, "log") == Log(interval=5)
        assert config.build(dict[str, int], "sizes") == {"a": 1}
        assert config.build(int, "net.in_channels") == 8

    def test_an_absent_table_is_all_defaults(self, made):
        assert made(LINEAR).build(Log, "log") == Log()
        with pytest.raises(UsageError, match=r"^plan is not set$"):
            made(LINEAR).build(Plan, "plan")

    def test_built_values_are_copies(self, made):
        config = made(LINEAR + "vars = { a = [1] }")
        config.build(Recipe).vars["a"].append(2)
        assert config.build(Recipe).vars == {"a": [1]} and config.values["vars"] == {"a": [1]}

    def test_a_constructor_that_raises(self, made):
        config = made('[net]\ntype = "Stack"\nlayers = []\ndropout = 2')
        with pytest.raises(UsageError, match=r"^x\.toml:2: net: dropout is 2\.0, expected below 1$"):
            config.build(Recipe)
        with pytest.raises(UsageError, match=r"^x\.toml: seed 3 is odd$"):
            made("", "seed=3", base=LINEAR, schema={}).build(Odd)

    def test_a_users_own_component(self, made, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "own_net.py").write_text(
            f"from {__name__} import Net\n\nclass Own(Net):\n    def __init__(self, width: int): self.width = width\n"
        )
        text = 'custom_imports = ["own_net"]\n[net]\ntype = "Own"\n'
        assert made(text + "width = 3").build(Recipe).net.width == 3
        with pytest.raises(UsageError) as caught:
            made(text + "wdth = 3").build(Recipe)
        assert str(caught.value) == "x.toml:5: net.wdth: unknown key of Own; did you mean width?"
        Net.registry.pop("Own")

    def test_an_import_that_fails(self, made):
        config = made(LINEAR + 'custom_imports = [\n  "json",\n  "no_such_module_here",\n]')
        with pytest.raises(UsageError) as caught:
            config.build(Recipe)
        expected = (
            "x.toml:5: custom_imports.1: cannot import no_such_module_here: No module named 'no_such_module_here'"
        )
        assert str(caught.value) == expected


class TestExplain:
    def test_chain_and_meaning(self, made):
        config = made("[net]\nin_channels = 16", "net.in_channels=32", base=LINEAR)
        assert explain(config, "net.in_channels", SCHEMA).splitlines() == [
            "net.in_channels = 32",
            "  # width that enters, in features.",
            "  base.toml:1  8",
            "  x.toml:3  16",
            "  --set net.in_channels=32",
        ]

    def test_tables_and_lists(self, made):
        text = '[net]\ntype = "Stack"\n[[net.layers]]\ntype = "Linear"\nin_channels = 1\n'
        config = made(text, "net.layers.0.bias=false")
        assert explain(config, "net.layers.0", SCHEMA).splitlines() == [
            'net.layers.0 = { type = "Linear", in_channels = 1, bias = false }',
            "  # A linear layer.",
            "  x.toml:4",
            "  --set net.layers.0.bias=false",
        ]

    def test_references_are_followed(self, made):
        text = 'vars = { a = 4, b = "${vars.a}" }\nnet = { type = "Linear", in_channels = "${vars.b}" }'
        assert explain(made(text), "net.in_channels", SCHEMA).splitlines()[2:] == [
            '  x.toml:3  "${vars.b}"',
            "    ${vars.b}",
            '      x.toml:2  "${vars.a}"',
            "        ${vars.a}",
            "          x.toml:2  4",
        ]

    def test_defaults_and_unknown_keys(self, made):
        config = made(LINEAR)
        assert (
            explain(config, "net.bias", SCHEMA)
            == "net.bias = true\n  # whether a bias is added.\n  default of the code"
        )
        assert explain(config, "log.interval", SCHEMA).startswith("log.interval = 50\n")
        assert explain(config, "epochs", SCHEMA) == "epochs\n  not set"
        hints = {"net.bais": "did you mean bias?", "nett": "did you mean net?", "zz.y": None, "net.in_channels.x": None}
        for key, hint in hints.items():
            with pytest.raises(UsageError) as caught:
                explain(config, key, SCHEMA)
            assert str(caught.value) == f"{key}: there is no such key" + (f"; {hint}" if hint else "")

    @pytest.mark.parametrize(("layers", "length"), [([], "0 elements"), ([LINEAR[6:-1]], "1 element")])
    def test_an_element_that_does_not_exist(self, made, layers, length):
        config = made(f'net = {{ type = "Stack", layers = [{", ".join(layers)}] }}')
        with pytest.raises(UsageError) as caught:
            explain(config, "net.layers.3.bias", SCHEMA)
        assert str(caught.value) == f"net.layers.3.bias: there is no such key; net.layers has {length}"

    def test_all_keys_of_a_part(self, made):
        text = 'vars.n = 1\n[net]\ntype = "Stack"\n[[net.layers]]\ntype = "Linear"\nin_channels = "${vars.n}"\n'
        config = made(text, base='[net]\ntype = "Stack"\nscale = [0, 2]\n')
        assert explain_all(config, "net", SCHEMA, 60) == "\n".join(
            [
                "[net]",
                "  # the network.",
                'type = "Stack"',
                "  # Layers in a row.",
                '  base.toml:2  "Stack"',
                '  x.toml:4  "Stack"',
                "scale = [0, 2]                                   base.toml:3",
                "  # factors, low and high.",
                "dropout = 0.0                            default of the code",
                "  # probability; True is refused.",
                "",
                "[net.layers]",
                "  # the layers.",
                "  x.toml:5",
                "",
                "[net.layers.0]",
                'type = "Linear"                                     x.toml:6',
                "  # A linear layer.",
                "in_channels = 1",
                "  # width that enters, in features.",
                '  x.toml:7  "${vars.n}"',
                "    ${vars.n}",
                "      x.toml:2  1",
                "bias = true                              default of the code",
                "  # whether a bias is added.",
            ]
        )

    def test_all_keys_of_a_config(self, made):
        lines = explain_all(made(LINEAR, "log.interval=5"), "", SCHEMA, 60).splitlines()
        assert lines[:4] == [
            "# x, set by (later over earlier)",
            "#   base.toml",
            "#   x.toml",
            "#   --set log.interval=5",
        ]
        assert f"epochs{'not set':>54}" in lines
        assert f"sizes = {{}}{'default of the code':>50}" in lines
        log = lines.index("[log]")
        assert lines[log + 1 :] == [
            "  # What is written down.",
            "interval = 5                            --set log.interval=5",
            "  # steps between rows.",
            'micro = "auto"                           default of the code',
            "  # samples at once.",
            'hooks = ["wandb"]                        default of the code',
        ]

    def test_a_place_that_does_not_fit_goes_below(self, made):
        config = made(f'{LINEAR}vars.long = "{"x" * 70}"\nvars.numbers = [{"1000, " * 20}]', "log.interval=5")
        lines = explain_all(config, "vars", SCHEMA, 60).splitlines()
        assert lines[1:3] == [f'long = "{"x" * 70}"', "  x.toml:3"]
        assert lines[3:5] == ["numbers = [", "  1000,"] and lines[-2:] == ["]", "  x.toml:4"]

    @pytest.mark.parametrize("path", ALIASES)
    def test_all_values_of_a_shipped_recipe_are_explained(self, path, monkeypatch):
        """Every value of `config print` appears under its header, and only long values exceed the width."""
        monkeypatch.chdir(ROOT)
        config = load(path)
        told, table = {}, ""
        for line in explain_all(config, width=90).splitlines():
            is_place = line.strip("# ").startswith(("configs/", config.name))  # paths and names are not wrapped
            assert len(line) <= 90 or is_place or " " not in line.strip(), line
            if line.startswith("["):
                table = line[1:-1] + "."
            elif line[:1] not in ("", " ", "#", "]", "}"):
                name, _, value = line.partition(" = ")
                told[table + name] = value
        for key, node in walk(config.root):
            if not isinstance(node.value, dict | list) and not isinstance(key[-1], int):
                assert told[show(key)].startswith(inline(node.value)), show(key)
        assert "monitor.knn_k" in told and "engine.threads" in told
