"""What is allowed in a recipe but rarely meant, with these images: a line of advice each, at the start of a run."""

from sslrun.nn.queue_and_bank import Queue
from sslrun.plan import Plan
from sslrun.recipe import Recipe


def advice(recipe: Recipe, plan: Plan) -> list[str]:
    """Lines for the user; each begins with the key to change."""
    return [line for check in _CHECKS for line in check(recipe, plan)]


def _queue(recipe: Recipe, plan: Plan) -> list[str]:
    lengths = [len(module.rows) for module in recipe.model.modules() if isinstance(module, Queue)]
    if max(lengths, default=0) <= plan.num_samples:
        return []
    fits = 1 << max(0, plan.num_samples.bit_length() - 1)
    return [
        f"model.queue_len is {max(lengths):,}, but there are {plan.num_samples:,} images, so an image is among its own "
        f"negatives: {fits:,} or less"
    ]


def _batch_of_one(recipe: Recipe, plan: Plan) -> list[str]:
    if plan.global_batch // plan.accumulation > 1:
        return []
    key = "global_batch" if plan.global_batch == 1 else "engine.micro_batch"
    what = "compares the images of a batch" if recipe.model.compares_samples else "has statistics of a batch"
    return [f"{key} leaves one image at a time, and {type(recipe.model).__name__} {what}: 2 or more, better 64"]


def _log_interval(recipe: Recipe, plan: Plan) -> list[str]:
    if recipe.log.interval <= plan.steps_per_epoch:
        return []
    return [
        f"log.interval is {recipe.log.interval} steps, but an epoch has {plan.steps_per_epoch}: at most that many, "
        "for a row in each epoch"
    ]


def _warm_up(recipe: Recipe, plan: Plan) -> list[str]:
    steps = recipe.lr.warmup_steps(plan.steps_per_epoch)
    if steps < plan.total_steps or steps == 0:
        return []
    key = "lr.warmup_iters" if recipe.lr.warmup_iters else "lr.warmup_epochs"
    return [
        f"{key} makes a warm-up of {steps:,} steps, but the run has {plan.total_steps:,}: the learning rate never "
        "reaches its value"
    ]


def _hooks(recipe: Recipe, plan: Plan) -> list[str]:
    settings = {"wandb": recipe.log.wandb, "mlflow": recipe.log.mlflow}
    return [
        f'log.{word} is set, but log.hooks does not name "{word}", so it gets no rows'
        for word, hook in settings.items()
        if hook != type(hook)() and word not in recipe.log.hooks
    ]


def _knn(recipe: Recipe, plan: Plan) -> list[str]:
    monitor, method = recipe.monitor, type(recipe.model)
    if method.is_measured_by_knn or monitor.probe_interval or not monitor.knn_interval:
        return []
    return [
        f"monitor.knn_interval is set, but k-NN is not the measure of {method.__name__}, whose features serve "
        f"classifiers that are trained: monitor.probe_interval = {monitor.knn_interval} adds a linear probe"
    ]


_CHECKS = (_queue, _batch_of_one, _log_interval, _warm_up, _hooks, _knn)
