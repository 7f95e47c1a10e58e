"""Ray Serve with the bare classifier: bodies of PNG or raw pixels, one by one or in dynamic batches, replicas."""

import os
import signal
import threading

import numpy as np
import ray
from classifier import Classifier
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

BATCH = int(os.environ["BENCH_BATCH"])
SETTINGS = {name: value for name, value in os.environ.items() if name.startswith("BENCH_")}


@serve.deployment(
    num_replicas=int(os.environ["BENCH_WORKERS"]),
    max_ongoing_requests=256,
    ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": SETTINGS}},
)
class Bare:
    """Gather what waits where batches are wanted, classify it, and give each its part."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=float(os.environ["BENCH_WAIT_SECONDS"]))
    async def gathered(self, images: list[np.ndarray]) -> list[dict[str, object]]:
        return [Classifier.told(row) for row in self.classifier.predict(np.stack(images))]

    async def __call__(self, request: Request) -> JSONResponse:
        pixels = self.classifier.pixels(await request.body(), request.headers.get("content-type"))
        if BATCH == 1:
            return JSONResponse(Classifier.told(self.classifier.predict(pixels[None])[0]))
        return JSONResponse(await self.gathered(pixels))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
    serve.run(Bare.bind(), route_prefix="/classify")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    os._exit(0)  # an orderly end takes Ray many seconds; whoever started this ends what it started
