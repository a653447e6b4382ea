"""Ask, and get the subscriber's answer: the reply is part of its commit."""

import asyncio

from pipeline import Channel, Event, Pipeline, Reject, RequestFailed


class Question(Event):
    number: int


class Factors(Event):
    of: int
    primes: list[int]


questions = Channel("example.questions", Question, reply=Factors, frame=1)
app = Pipeline("arithmetic")


@app.subscriber(questions, group="factors")
async def factorise(question: Question) -> Factors:
    rest, primes = question.number, []
    if rest < 2:
        raise Reject(f"{rest} has no prime factors")
    for divisor in range(2, rest + 1):
        while rest % divisor == 0:
            rest, primes = rest // divisor, [*primes, divisor]
    return Factors(of=question.number, primes=primes)


async def main() -> None:
    async with app:
        serving = asyncio.create_task(app.serve())
        for number in (84, 97, 1):
            try:
                answer = await app.request(questions, Question(number=number), timeout=10.0)
                print(f"{answer.of} = {' · '.join(map(str, answer.primes))}")
            except RequestFailed as error:
                print(error)
        app.stop()
        await serving


asyncio.run(main())
