"""Search hyperparameters by successive halving, and grow a forest: every trial and every tree is an event."""

import asyncio
import time

from sklearn import datasets, linear_model, model_selection, tree, utils

from pipeline import Pipeline, testing
from publishers.mapreduce import scatter
from publishers.search import successive_halving
from subscribers.mapreduce import worker

x, unseen, y, truth = model_selection.train_test_split(*datasets.load_digits(return_X_y=True), random_state=0)
app = Pipeline("search")  # in a module of its own, on any hosts: `pipeline serve search:app`


@worker(app, "trials", concurrency=2)
def trial(asked: dict) -> float:
    model = linear_model.SGDClassifier(**asked["parameters"], max_iter=asked["resource"], tol=None, random_state=0)
    return model.fit(x, y).score(unseen, truth)


@worker(app, "trees", concurrency=2)  # scikit-learn lets go of the GIL; else: run_in="process"
def grow(n: int):  # → probabilities [samples, classes]
    return tree.DecisionTreeClassifier(random_state=n).fit(*utils.resample(x, y, random_state=n)).predict_proba(unseen)


async def main() -> None:
    async with testing.serving(app):
        best = (await successive_halving(app, "trials", [{"alpha": 10.0**-n} for n in range(8)], budget=800))[0]
        print(f"best: {best.parameters}, {best.score:.3f} after {best.resource} epochs")
        began, trees, done = time.perf_counter(), await scatter(app, "trees", range(100)), time.perf_counter()
        alone, ended = [grow(n) for n in range(100)], time.perf_counter()
        same, accuracy = (sum(trees) == sum(alone)).all(), (sum(trees).argmax(1) == truth).mean()
        print(f"forest: {accuracy:.3f}, as grown alone: {same}")
        print(f"speed-up: {(ended - done) / (done - began):.2f} ×")


asyncio.run(main())
