"""Tensors in batches: numpy or torch go in, read-only views come out, without a copy and without pickle."""

import asyncio

import numpy as np

from pipeline import Batch, Channel, Event, Pipeline, Tensor


class Signal(Event):
    name: str
    samples: Tensor


sounds, spectra = Channel("example.sounds", Signal), Channel("example.spectra", Signal)
app = Pipeline("spectroscope")


@app.subscriber(sounds, group="fourier", publishes=spectra, batch=Batch(64, wait=0.05), run_in="thread")
def transform(batch: list[Signal]) -> list[Signal]:
    power = np.abs(np.fft.rfft(np.stack([sound.samples for sound in batch]))) ** 2  # one call for the whole batch
    return [Signal(name=sound.name, samples=Tensor(row)) for sound, row in zip(batch, power, strict=True)]


async def main() -> None:
    time = np.arange(512, dtype=np.float32) / 512
    tones = {"hum": 50, "low E": 82, "low C": 64}
    async with app, app.watch(spectra) as stream:
        serving = asyncio.create_task(app.serve())
        waves = [Signal(name=name, samples=Tensor(np.sin(2 * np.pi * hz * time))) for name, hz in tones.items()]
        await app.publish(sounds, waves)
        for _ in tones:
            spectrum = (await anext(aiter(stream))).event
            print(f"{spectrum.name}: loudest at {np.argmax(spectrum.samples)} Hz, {spectrum.samples!r}")
        app.stop()
        await serving


asyncio.run(main())
