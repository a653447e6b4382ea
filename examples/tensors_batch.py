"""Tensors in batches: numpy or torch go in, read-only views come out, without a copy and without pickle."""

import asyncio

import numpy as np

from pipeline import Batch, Channel, Event, Pipeline, Tensor


class Signal(Event):
    name: str
    samples: Tensor


class Spectrum(Event):
    name: str
    loudest: int
    power: Tensor


signals = Channel("example.signals", Signal)
spectra = Channel("example.spectra", Spectrum)
app = Pipeline("spectroscope")


@app.subscriber(signals, group="fourier", publishes=spectra, batch=Batch(64, wait=0.05), run_in="thread")
def transform(batch: list[Signal]) -> list[Spectrum]:
    power = np.abs(np.fft.rfft(np.stack([signal.samples for signal in batch]))) ** 2  # one call for the whole batch
    return [Spectrum(name=s.name, loudest=int(p.argmax()), power=p) for s, p in zip(batch, power, strict=True)]


async def main() -> None:
    time = np.arange(512, dtype=np.float32) / 512
    async with app, app.watch(spectra) as stream:
        serving = asyncio.create_task(app.serve())
        tones = [Signal(name=f"{hertz} Hz", samples=np.sin(2 * np.pi * hertz * time)) for hertz in (5, 50, 120)]
        await app.publish(signals, tones)
        async for message in stream:
            print(f"{message.event.name}: loudest at {message.event.loudest} Hz, {message.event.power!r}")
            if message.event.name == tones[-1].name:
                break
        app.stop()
        await serving


asyncio.run(main())
