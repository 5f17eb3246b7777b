"""Names the parameters of a converted model, here and in the old framework, to translate rules for some of them.

Rules choose parameters by what their names look like, and names differ: the first norm of a projector is `neck.bn0`
there and `neck.mlp.1` here. So a rule is not rewritten but answered: the parameters that it means get a rule that means
just those. Nothing here needs torch; the tests hold these lists against the models themselves.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_VIT_BLOCKS = {"tiny": 12, "small": 12, "base": 12, "large": 24}
MAX_ENDS = 30  # ends of names in a pattern; what they do not cover is listed by whole names


class Parameter(NamedTuple):
    """One trained parameter: our name, the old one, and whether it is the scale or shift of a norm."""

    name: str
    old: str
    of_norm: bool

    def is_one_of(self, kinds: list[str]) -> bool:
        """Whether it is of one of these kinds of `[[optimizer.paramwise]]`."""
        is_so = {"norm": self.of_norm, "bias": self.name.endswith(".bias"), "embedding": self.name.endswith("_token")}
        return any(is_so[kind] for kind in kinds)


class _Layer(NamedTuple):
    """A layer: our name, the old one where it is another, whether it has a bias, and whether it is a norm."""

    name: str
    old: str = ""
    bias: bool = True
    of_norm: bool = False


def trained(model: dict[str, Any]) -> list[Parameter] | None:
    """The trained parameters of a converted `[model]`; None where they are not known."""
    found: list[Parameter] = []
    for key, layers_of in (("backbone", _backbone), ("neck", _neck), ("head", _head)):
        layers = layers_of(model[key]) if isinstance(model.get(key), dict) else []
        if layers is None:
            return None
        for layer in layers:
            ends = ("",) if layer.name.endswith("cls_token") else (".weight", ".bias")[: 1 + layer.bias]
            ours, old = f"{key}.{layer.name}", f"{key}.{layer.old or layer.name}"
            found += [Parameter(f"{ours}{end}", f"{old}{end}", layer.of_norm) for end in ends]
    return found or None


def _below(prefix: str, layers: list[_Layer] | None) -> list[_Layer] | None:
    """Puts a prefix before the names of layers."""
    if layers is None:
        return None
    return [
        layer._replace(name=f"{prefix}.{layer.name}", old=f"{prefix}.{layer.old or layer.name}") for layer in layers
    ]


def _backbone(table: dict[str, Any]) -> list[_Layer] | None:
    match table.get("type"):
        case "Sobel" if isinstance(table.get("backbone"), dict):
            inside = _backbone(table["backbone"])
            return inside and [_Layer(f"backbone.{name}", old or name, *rest) for name, old, *rest in inside]
        case "ResNet" if isinstance(table.get("depth"), int) and table["depth"] in _BLOCKS:
            return list(_resnet(table))
        case "VisionTransformer":
            return list(_vit(table))
    return None


def _resnet(table: dict[str, Any]) -> Iterator[_Layer]:
    depth, frozen, indices = table["depth"], table.get("frozen_stages", -1), table.get("out_indices", [4])
    frozen = frozen if isinstance(frozen, int) else -1
    last = max((i for i in indices if isinstance(i, int)), default=4) if isinstance(indices, list) else 4
    if frozen < 0:
        yield from (_Layer("conv1", bias=False), _Layer("bn1", of_norm=True))
    for stage, count in enumerate(_BLOCKS[depth][: max(last, 0)], start=1):
        for block in range(count if stage > frozen else 0):
            name = f"layer{stage}.{block}"
            for index in range(1, 3 if depth < 50 else 4):
                yield from (_Layer(f"{name}.conv{index}", bias=False), _Layer(f"{name}.bn{index}", of_norm=True))
            if block == 0 and (stage > 1 or depth >= 50):
                yield from (_Layer(f"{name}.downsample.0", bias=False), _Layer(f"{name}.downsample.1", of_norm=True))


def _vit(table: dict[str, Any]) -> Iterator[_Layer]:
    yield _Layer("cls_token")
    if not table.get("frozen_patch_embed", True):
        yield _Layer("patch_embed.proj", "patch_embed.projection")
    depth = table.get("depth") or _VIT_BLOCKS.get(str(table.get("arch", "small")), 12)
    for index in range(min(depth, 100) if isinstance(depth, int) else 12):
        ours, old = f"blocks.{index}", f"layers.{index}"
        yield _Layer(f"{ours}.norm1", f"{old}.ln1", of_norm=True)
        yield from (_Layer(f"{ours}.attn.qkv", f"{old}.attn.qkv"), _Layer(f"{ours}.attn.proj", f"{old}.attn.proj"))
        yield _Layer(f"{ours}.norm2", f"{old}.ln2", of_norm=True)
        yield from (
            _Layer(f"{ours}.mlp.fc1", f"{old}.ffn.layers.0.0"),
            _Layer(f"{ours}.mlp.fc2", f"{old}.ffn.layers.1"),
        )
    yield _Layer("norm", "ln1", of_norm=True)


def _neck(table: dict[str, Any]) -> list[_Layer] | None:
    norm = table.get("norm_cfg")
    affine = isinstance(norm, dict) and bool(norm.get("affine", True))
    match table.get("type"):
        case "AvgPool2dNeck":
            return []
        case "LinearNeck":
            return [_Layer("fc")]
        case "MoCoV2Neck":
            return [_Layer("mlp.0"), _Layer("mlp.2")]
        case "DenseCLNeck":
            return [_Layer("mlp.0"), _Layer("mlp.2"), _Layer("mlp2.0"), _Layer("mlp2.2")]
        case "ODCNeck":
            return [_Layer("fc0"), *([_Layer("bn0", of_norm=True)] if affine else []), _Layer("fc1")]
        case "RelativeLocNeck":
            return [_Layer("fc"), *([_Layer("bn", of_norm=True)] if affine or norm is None else [])]
        case "NonLinearNeck":
            return list(_mlp(table, affine or norm is None))
    return None


def _mlp(table: dict[str, Any], affine: bool) -> Iterator[_Layer]:
    layers = table.get("num_layers", 2)
    last = min(layers, 100) - 1 if isinstance(layers, int) else 1
    with_last_norm = table.get("with_last_bn", True) and table.get("with_last_bn_affine", True)
    for index in range(last + 1):
        bias = table.get("with_last_bias" if index == last else "with_bias", False)
        yield _Layer(f"mlp.{3 * index}", f"fc{index}", bool(bias))
        if affine and (index < last or with_last_norm):
            yield _Layer(f"mlp.{3 * index + 1}", f"bn{index}", of_norm=True)


def _head(table: dict[str, Any]) -> list[_Layer] | None:
    match table.get("type"):
        case "ContrastiveHead" | "LatentCrossCorrelationHead":
            return []
        case "ClsHead":
            return [_Layer("fc", "fc_cls")]
        case "SwAVHead":
            return [_Layer("prototypes", bias=False)]
        case "LatentPredictHead" | "MoCoV3Head" if isinstance(table.get("predictor"), dict):
            return _below("predictor", _neck(table["predictor"]))
    return None


def pattern_of(chosen: set[str], names: list[str], written: str) -> str:
    """A regular expression that is found in just these of the names: the one that was written, where it is such."""
    if _found(written, names) == chosen:
        return written
    found: list[str] = []
    left = set(chosen)
    for name in sorted(chosen):
        if name in left and len(found) == MAX_ENDS:
            return "|".join([*found, *(f"^{re.escape(name)}$" for name in sorted(left))])
        if name in left:
            suffix = next(_suffixes(name, lambda pattern: (_found(pattern, names) or {""}) <= chosen))
            found.append(suffix)
            left -= _found(suffix, names) or set()
    return "|".join(found)


def _suffixes(name: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Ends of a name that fit, the shortest first, with any number for a number before with that number."""
    parts = name.split(".")
    for count in (count for count in range(1, len(parts) + 1) if not parts[-count].isdecimal()):
        exact = [re.escape(part) for part in parts[-count:]]
        general = [re.sub(r"\d+", lambda m: r"\d" if len(m[0]) == 1 else r"\d+", part) for part in exact]
        yield from (f"{pattern}$" for pattern in (r"\.".join(general), r"\.".join(exact)) if fits(f"{pattern}$"))
    yield f"^{re.escape(name)}$"


def _found(pattern: str, names: list[str]) -> set[str] | None:
    """The names that a pattern is found in; None where it is no pattern, or could take too long."""
    return {name for name in names if re.search(pattern, name)} if is_simple(pattern) else None


def is_simple(pattern: str) -> bool:
    """Whether a pattern can be searched for: it is one, and has few repetitions, none of them of a group."""
    repeats = re.findall(r"(?<!\\)[*+{?]", pattern)
    unbounded = [sign for sign in repeats if sign != "?"]
    if len(pattern) > 500 or len(repeats) > 6 or len(unbounded) > 2 or re.search(r"(?<!\\)\)[*+{]", pattern):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
