"""Live channels are plain Redis Pub/Sub: any client can publish to them and listen to them."""

import asyncio
import os

import redis.asyncio as redis

from pipeline import Channel, Pipeline

music = Channel("classical_music", str, durable=False)


async def main() -> None:
    bare = redis.from_url(os.environ.get("PIPELINE_REDIS_URL", "redis://127.0.0.1:6379/0"), decode_responses=True)
    async with Pipeline("radio") as app, bare, bare.pubsub() as listener:
        async with app.watch(music) as stream:
            await bare.publish("classical_music", "Raga Vairabi - Pt. Ajoy Chakrabarty")
            message = await anext(aiter(stream))
            print(f"the pipeline heard: {message.event}")

        await listener.subscribe("classical_music")
        await listener.get_message(timeout=5)  # that the subscription stands
        await app.publish(music, "Raga Yaman - Kishori Amonkar")
        heard = await listener.get_message(timeout=5)
        print(f"a bare client heard: {heard['data']}")


asyncio.run(main())
