"""LitServe with the bare classifier: bodies of PNG or raw pixels, one by one or in dynamic batches."""

import os
from typing import Annotated

import litserve
import numpy as np
from classifier import Classifier
from fastapi import Depends, Request


async def sent(request: Request) -> tuple[bytes, str | None]:
    """Return a request's body and the type of its content."""
    return await request.body(), request.headers.get("content-type")


class Single(litserve.LitAPI):
    """Decode an image, classify it and answer."""

    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Annotated[tuple[bytes, str | None], Depends(sent)]) -> np.ndarray:
        return self.classifier.pixels(*request)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.classifier.predict(x[None])[0]

    def encode_response(self, output: np.ndarray) -> dict[str, object]:
        return Classifier.told(output)


class Gathered(Single):
    """Gather a batch, classify it, and give each its part."""

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.classifier.predict(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)


if __name__ == "__main__":
    largest, wait = int(os.environ["BENCH_BATCH"]), float(os.environ["BENCH_WAIT_SECONDS"])
    server = litserve.LitServer(
        Single() if largest == 1 else Gathered(max_batch_size=largest, batch_timeout=wait),
        accelerator="cpu",
        devices=1,
        workers_per_device=int(os.environ["BENCH_WORKERS"]),
        fast_queue=os.environ["BENCH_FAST_QUEUE"] == "1",
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=int(os.environ["BENCH_API_SERVERS"]),
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
