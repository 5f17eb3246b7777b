"""Which parameters a model has, by our names and by MMSelfSup's, so that a rule for some of them can be translated.

Rules choose parameters by what their names look like, and names differ: the first norm of a projector is `neck.bn0`
there and `neck.mlp.1` here. So a rule is not rewritten but answered: the parameters that it means get a rule that means
just those. Nothing here needs torch; the tests hold these lists against the models themselves.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
MAX_ENDS = 30  # ends of names in a pattern; what they do not cover is listed by whole names
_VIT_BLOCKS = {"tiny": 12, "small": 12, "base": 12, "large": 24}


class Parameter(NamedTuple):
    """One trained parameter: our name, MMSelfSup's, and whether it is the scale or shift of a norm."""

    name: str
    old: str
    of_norm: bool


def trained(model: dict[str, Any]) -> list[Parameter] | None:
    """The trained parameters of a converted `[model]`; None where they are not known."""
    found: list[Parameter] = []
    for key, names in (("backbone", _backbone), ("neck", _neck), ("head", _head)):
        table = model.get(key)
        if isinstance(table, dict):
            inside = names(table)
            if inside is None:
                return None
            found += [Parameter(f"{key}.{p.name}", f"{key}.{p.old}", p.of_norm) for p in inside]
    return found or None


def _backbone(table: dict[str, Any]) -> list[Parameter] | None:
    match table.get("type"):
        case "Sobel" if isinstance(table.get("backbone"), dict):
            inside = _backbone(table["backbone"])
            return None if inside is None else [p._replace(name=f"backbone.{p.name}") for p in inside]
        case "ResNet" if isinstance(table.get("depth"), int) and table["depth"] in _BLOCKS:
            return list(_resnet(table))
        case "VisionTransformer":
            return list(_vit(table))
    return None


def _resnet(table: dict[str, Any]) -> Iterator[Parameter]:
    depth, frozen = table["depth"], table.get("frozen_stages", -1)
    frozen = frozen if isinstance(frozen, int) else -1
    indices = table.get("out_indices", [4])
    last = max((i for i in indices if isinstance(i, int)), default=4) if isinstance(indices, list) else 4
    convolutions = 2 if depth < 50 else 3
    if frozen < 0:
        yield from _plain("conv1", bias=False)
        yield from _plain("bn1", of_norm=True)
    for stage, count in enumerate(_BLOCKS[depth][: max(last, 0)], start=1):
        for block in range(count if stage > frozen else 0):
            for index in range(1, convolutions + 1):
                yield from _plain(f"layer{stage}.{block}.conv{index}", bias=False)
                yield from _plain(f"layer{stage}.{block}.bn{index}", of_norm=True)
            if block == 0 and (stage > 1 or depth >= 50):
                yield from _plain(f"layer{stage}.{block}.downsample.0", bias=False)
                yield from _plain(f"layer{stage}.{block}.downsample.1", of_norm=True)


def _vit(table: dict[str, Any]) -> Iterator[Parameter]:
    yield Parameter("cls_token", "cls_token", False)
    if not table.get("frozen_patch_embed", True):
        yield from _both("patch_embed.proj", "patch_embed.projection")
    depth = table.get("depth") or _VIT_BLOCKS.get(str(table.get("arch", "small")), 12)
    for index in range(min(depth, 100) if isinstance(depth, int) else 12):
        ours, old = f"blocks.{index}", f"layers.{index}"
        yield from _both(f"{ours}.norm1", f"{old}.ln1", of_norm=True)
        yield from _both(f"{ours}.attn.qkv", f"{old}.attn.qkv")
        yield from _both(f"{ours}.attn.proj", f"{old}.attn.proj")
        yield from _both(f"{ours}.norm2", f"{old}.ln2", of_norm=True)
        yield from _both(f"{ours}.mlp.fc1", f"{old}.ffn.layers.0.0")
        yield from _both(f"{ours}.mlp.fc2", f"{old}.ffn.layers.1")
    yield from _both("norm", "ln1", of_norm=True)


def _neck(table: dict[str, Any]) -> list[Parameter] | None:
    match table.get("type"):
        case "AvgPool2dNeck":
            return []
        case "LinearNeck":
            return list(_plain("fc"))
        case "MoCoV2Neck":
            return [*_plain("mlp.0"), *_plain("mlp.2")]
        case "DenseCLNeck":
            return [*_plain("mlp.0"), *_plain("mlp.2"), *_plain("mlp2.0"), *_plain("mlp2.2")]
        case "ODCNeck":
            return [*_plain("fc0"), *(_plain("bn0", of_norm=True) if _affine(table, False) else ()), *_plain("fc1")]
        case "RelativeLocNeck":
            return [*_plain("fc"), *(_plain("bn", of_norm=True) if _affine(table, True) else ())]
        case "NonLinearNeck":
            return list(_mlp(table))
    return None


def _mlp(table: dict[str, Any]) -> Iterator[Parameter]:
    layers = table.get("num_layers", 2)
    layers = min(layers, 100) if isinstance(layers, int) else 2
    for index in range(layers):
        is_last = index == layers - 1
        bias = table.get("with_last_bias", False) if is_last else table.get("with_bias", False)
        yield from _both(f"mlp.{3 * index}", f"fc{index}", bias=bool(bias))
        affine = table.get("with_last_bn", True) and table.get("with_last_bn_affine", True) if is_last else True
        if affine and _affine(table, True):
            yield from _both(f"mlp.{3 * index + 1}", f"bn{index}", of_norm=True)


def _affine(table: dict[str, Any], usual: bool) -> bool:
    norm = table.get("norm_cfg")
    return bool(norm.get("affine", True)) if isinstance(norm, dict) else usual


def _head(table: dict[str, Any]) -> list[Parameter] | None:
    match table.get("type"):
        case "ContrastiveHead" | "LatentCrossCorrelationHead":
            return []
        case "ClsHead":
            return list(_both("fc", "fc_cls"))
        case "SwAVHead":
            return list(_plain("prototypes", bias=False))
        case "LatentPredictHead" | "MoCoV3Head" if isinstance(table.get("predictor"), dict):
            inside = _neck(table["predictor"])
            return (
                None
                if inside is None
                else [Parameter(f"predictor.{p.name}", f"predictor.{p.old}", p.of_norm) for p in inside]
            )
    return None


def _plain(name: str, bias: bool = True, of_norm: bool = False) -> Iterator[Parameter]:
    return _both(name, name, bias, of_norm)


def _both(name: str, old: str, bias: bool = True, of_norm: bool = False) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", f"{old}.weight", of_norm)
    if bias:
        yield Parameter(f"{name}.bias", f"{old}.bias", of_norm)


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


def matching(pattern: str, parameters: list[Parameter]) -> set[str] | None:
    """Our names of the parameters in whose old names a pattern is found; None where it cannot be searched for."""
    if not is_simple(pattern):
        return None
    return {parameter.name for parameter in parameters if re.search(pattern, parameter.old)}
