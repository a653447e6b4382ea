"""Ask, and get the subscriber's answer: the reply is part of its commit."""

import asyncio

from pipeline import Channel, Event, Pipeline, Reject, RequestFailed


class Division(Event):
    dividend: int
    divisor: int


divisions = Channel("example.divisions", Division, reply=str, frame=1)
app = Pipeline("arithmetic")


@app.subscriber(divisions, group="dividers")
async def divide(division: Division) -> str:
    if division.divisor == 0:
        raise Reject("nothing can be divided by zero")
    return "{} remainder {}".format(*divmod(division.dividend, division.divisor))


async def main() -> None:
    async with app:
        serving = asyncio.create_task(app.serve())
        for dividend, divisor in ((84, 12), (97, 10), (1, 0)):
            try:
                answer = await app.request(divisions, Division(dividend=dividend, divisor=divisor), timeout=10.0)
                print(f"{dividend} / {divisor} = {answer}")
            except RequestFailed as error:
                print(error)
        app.stop()
        await serving


asyncio.run(main())
