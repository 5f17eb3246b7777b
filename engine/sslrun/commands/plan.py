"""The verb `plan`: how long a recipe takes on GPUs that need not be here."""

import argparse
import json
from typing import Any

from sslrun.commands.arguments import DONE, add_config
from sslrun.errors import UsageError

GPUS = ("a100", "h100", "h200", "cpu")


def add(verbs: Any) -> None:
    """Adds the verb's parser."""
    plan = verbs.add_parser(
        "plan",
        help="estimate days, images per second and memory on GPUs that need not be here",
        description="Estimate how long a recipe takes, what each GPU holds, what is sent, what limits and what would "
        "help. Operations are counted, not run; neither the data nor a GPU is needed. Assumptions are printed; "
        "docs/scaling.md has their sources. --gpu cpu times the step's operations on this CPU.",
    )
    add_config(plan)
    plan.add_argument("--gpu", metavar="NAME", choices=GPUS, default="h100", help=f"{', '.join(GPUS)} (h100)")
    plan.add_argument("--gpus", metavar="N", type=_number, default=1, help="number of GPUs, one rank each (1)")
    plan.add_argument("--nodes", metavar="N", type=_number, help="number of machines (as few as hold 8 GPUs each)")
    plan.add_argument(
        "--network-gbit", metavar="N", type=_number, help="Gbit/s of the network for each GPU (400; 200 for a100)"
    )
    plan.add_argument("--samples", metavar="N", type=_number, help="number of images (default: the recipe's data set)")
    plan.add_argument("--json", action="store_true", help="print JSON: seconds, bytes, samples")
    plan.set_defaults(call=_plan)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, not {text!r}")
    return int(text)


def _plan(args: argparse.Namespace) -> int:
    nodes = args.nodes or -(-args.gpus // 8)
    if args.gpus % nodes:
        raise UsageError(f"--gpus {args.gpus} cannot be divided among --nodes {nodes}")
    if args.gpu == "cpu" and args.gpus > 1:
        raise UsageError("--gpu cpu estimates a run of one process: leave out --gpus")
    from sslrun.config import load
    from sslrun.config.dump import inline

    overrides = list(args.overrides)
    if args.gpu == "cpu":
        overrides.append(f"engine.device={inline('cpu')}")
    config = load(args.config, overrides)
    from sslrun.capacity import cluster_of, estimate, sized  # torch from here on
    from sslrun.capacity.text import as_dict, as_text

    recipe, num_samples = sized(config, args.samples)
    cluster = cluster_of(args.gpu, args.gpus, nodes, args.network_gbit)
    with config.naming_places():
        found = estimate(recipe, num_samples, cluster)
    if args.json:
        print(json.dumps(as_dict(config.name, cluster, found)))
    else:
        print(as_text(config.name, recipe, cluster, found))
    return DONE
