"""Who asks in the load profiles: clients that each send one image after the other, in one of three bodies."""

import json
import random
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant_pacing, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.image_sets import ImageSet, ImagesUnreadable, traffic
from loadtest.messages import Body

VERDICTS = frozenset(("accepted", "alert", "undefended"))
SECONDS_BETWEEN = 0.1


class ImageUser(FastHttpUser):
    """Send an image every tenth of a second, or as often as the answers come, and check that each is an answer."""

    abstract = True
    body: Body
    wait_time = constant_pacing(SECONDS_BETWEEN)
    network_timeout = connection_timeout = 30.0

    def on_start(self) -> None:
        """Make the requests, beginning with any of them."""
        options = self.environment.parsed_options
        images = ImageSet.read(Path(options.images))
        self.messages = traffic(images, options.attack_share, options.model, self.body, count=64)
        self.next = random.randrange(len(self.messages))

    @task
    def ask(self) -> None:
        """Send the next image."""
        message = self.messages[self.next]
        self.next = (self.next + 1) % len(self.messages)
        with self.client.post(
            message.path, data=message.content, headers=dict(message.headers), name=self.body, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
            elif not is_answer(response.content):
                response.failure("no verdict in the answer")


class FileUser(ImageUser):
    """Send PNG files, as most do."""

    body = "png"
    weight = 6


class BinaryUser(ImageUser):
    """Send binary tensors."""

    body = "binary"
    weight = 3


class JsonUser(ImageUser):
    """Send JSON."""

    body = "json"
    weight = 1


def is_answer(content: bytes | None) -> bool:
    """Say whether the content of an answer holds one image's verdict, in either of the gateway's forms."""
    try:
        answer: Any = json.loads(content or b"")
        if "predictions" in answer:
            verdicts = [prediction["verdict"] for prediction in answer["predictions"]]
        else:
            verdicts = next(output["data"] for output in answer["outputs"] if output["name"] == "verdict")
    except (ValueError, KeyError, TypeError, StopIteration):
        return False
    return len(verdicts) == 1 and verdicts[0] in VERDICTS


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add what the users need to know to Locust's options."""
    parser.add_argument("--images", default="var/bench/images.npz", help="images, from python -m loadtest.image_sets")
    parser.add_argument("--model", default="digits", help="the model to ask")
    parser.add_argument("--attack-share", type=float, default=0.0, help="the share of adversarial images, 0 to 1")
    parser.add_argument("--p99", type=float, default=None, help="milliseconds, in place of the profile's limit")
    parser.add_argument("--time-scale", type=float, default=1.0, help="stretches the profile's time")


@events.init.add_listener
def check_images(environment: Environment, **_: object) -> None:
    """End at once where there are no images to send."""
    try:
        ImageSet.read(Path(environment.parsed_options.images)).mixed(environment.parsed_options.attack_share, 1)
    except (ImagesUnreadable, ValueError) as error:
        raise SystemExit(str(error)) from error
