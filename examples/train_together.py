"""Two workers train one model: their gradients meet at the aggregator as events, and both end with the same weights.

python examples/train_together.py
"""

import asyncio

import torch
from sklearn import datasets, model_selection

from pipeline import testing
from publishers.training import join
from subscribers.aggregation import app  # as a program: pipeline serve subscribers.aggregation:app

split = model_selection.train_test_split(*datasets.load_digits(return_X_y=True), random_state=0)
images, unseen, labels, truth = (torch.as_tensor(part) for part in split)


def work(rank: int, workers: int) -> torch.nn.Linear:
    """The same in a process of its own, on any host that reaches the Redis."""
    model = torch.nn.Linear(64, 10, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    mine, wanted = images[rank::workers].float() / 16, labels[rank::workers]
    with join("example", model, workers=workers, rank=rank, compress="bf16") as run:
        while run.round < 100:
            loss = torch.nn.functional.cross_entropy(model(mine), wanted)
            loss.backward()
            run.step(optimizer, loss=loss, samples=len(mine))
    return model


async def main() -> None:
    async with testing.serving(app):
        first, second = await asyncio.gather(*(asyncio.to_thread(work, rank, 2) for rank in range(2)))
    print("the same weights:", all(map(torch.equal, first.parameters(), second.parameters())))
    print("nine of ten are right:", bool((first(unseen.float() / 16).argmax(1) == truth).float().mean() > 0.9))


asyncio.run(main())
