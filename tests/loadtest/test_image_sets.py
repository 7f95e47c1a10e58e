import json

import httpx
import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from loadtest import image_sets
from loadtest.connections import Message
from loadtest.image_sets import ImageSet, ImagesUnreadable
from loadtest.messages import base64_message, form_message, gateway_messages, raw_message
from model_store import Store
from service.engines import OnnxEngine


def test_adversarial_images_fool_the_classifier_and_stay_near(store, image_set):
    engine = OnnxEngine(Store.open(store / "models").fetch("digits", 1).folder / "model.onnx", ["logits"])
    answers = {
        name: engine.run(images.astype(np.float32) / 255)["logits"].argmax(1)
        for name, images in (("clean", image_set.clean), ("adversarial", image_set.adversarial))
    }
    near = np.abs(image_set.adversarial[:, None].astype(int) - image_set.clean[None]).max((2, 3, 4)) <= 8
    assert near.any(1).all(), "each is within 8/255 of a clean one"
    of = near.argmax(1)
    assert (answers["adversarial"] != answers["clean"][of]).all()
    assert len(image_set.clean) == 40
    assert len(image_set.adversarial) >= 2


def test_a_file_holds_what_was_written(image_set, images_file):
    read = ImageSet.read(images_file)
    assert np.array_equal(read.clean, image_set.clean)
    assert np.array_equal(read.adversarial, image_set.adversarial)


def test_mixed_images_have_the_share_that_was_asked_for(image_set):
    mixed = image_set.mixed(0.25, 80)
    clean = {image.tobytes() for image in image_set.clean}
    assert sum(image.tobytes() not in clean for image in mixed) == 20
    assert np.array_equal(mixed, image_set.mixed(0.25, 80))
    with pytest.raises(ValueError, match="from 0 to 1"):
        image_set.mixed(1.5, 10)


def test_a_file_without_images_is_refused_by_name(tmp_path):
    path = tmp_path / "none.npz"
    with pytest.raises(ImagesUnreadable, match=r"none\.npz"):
        ImageSet.read(path)
    np.savez(path, clean=np.zeros((2, 1, 4, 4), np.uint8))
    with pytest.raises(ImagesUnreadable, match="adversarial"):
        ImageSet.read(path)
    np.savez(path, clean=np.zeros((2, 4), np.uint8), adversarial=np.zeros((2, 1, 4, 4), np.uint8))
    with pytest.raises(ImagesUnreadable, match=r"clean is uint8 \(2, 4\)"):
        ImageSet.read(path)


def test_the_command_tells_what_it_wrote_and_what_is_missing(store, tmp_path):
    command = typer.Typer()
    command.command()(image_sets.main)
    arguments = ["digits", "--store", str(store), "--data", "digits", "--count", "20", "--output"]
    done = CliRunner().invoke(command, [*arguments, str(tmp_path / "images.npz")])
    assert done.exit_code == 0, done.output
    assert "20 clean and" in done.output
    missing = CliRunner().invoke(command, ["cats", *arguments[1:], str(tmp_path / "images.npz")])
    assert missing.exit_code == 1
    assert "cats" in missing.output


@pytest.mark.parametrize("body", ["png", "binary", "json"])
def test_every_body_is_the_same_image_to_the_gateway(server, image_set, body):
    message: Message = gateway_messages(image_set.clean[:1], "digits", body)[0]
    answer = httpx.post(f"{server.url}{message.path}", content=message.content, headers=dict(message.headers))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    if body == "png":
        index = told["predictions"][0]["class_index"]
    else:
        index = next(output["data"][0] for output in told["outputs"] if output["name"] == "class_index")
    sent = gateway_messages(image_set.clean[:1], "digits", "png")[0]
    alone = httpx.post(f"{server.url}{sent.path}", content=sent.content).json()["predictions"][0]
    assert index == alone["class_index"]


def test_bodies_of_other_servers_hold_the_image():
    import base64
    import io
    from email.parser import BytesParser

    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    encoded = json.loads(base64_message(pixels, "/infer").content)["inputs"][0]
    assert encoded["datatype"] == "BYTES"
    message = form_message(pixels, "/form", name="images")
    head = f"Content-Type: {dict(message.headers)['Content-Type']}\r\n\r\n".encode()
    part = BytesParser().parsebytes(head + message.content).get_payload()[0]
    assert part.get_param("name", header="content-disposition") == "images"
    for data in (base64.b64decode(encoded["data"][0]), part.get_payload(decode=True)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1), pixels)
    assert part.get_content_type() == "image/png"


def test_raw_bodies_are_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    message = raw_message(pixels.transpose(1, 2, 0).copy().transpose(2, 0, 1), "/raw")
    assert message.content == pixels.tobytes()
    assert dict(message.headers) == {"Content-Type": "application/octet-stream"}
    form = form_message(pixels, "/form", name="images", raw=True).content
    assert b"Content-Type: application/octet-stream\r\n\r\n" + pixels.tobytes() + b"\r\n--" in form
