"""Plain images in, predictions out."""

import io

import numpy as np
import pytest
from PIL import Image

from model_store import InputSpec
from service.engines import OnnxEngine
from service.images import decode_pixels

pytestmark = pytest.mark.asyncio(loop_scope="module")

LABELS = ("zero", "one", "two", "three")


@pytest.fixture(scope="module")
def alone(store) -> OnnxEngine:
    """The serving version's graph, without a gateway around it."""
    outputs = ["logits", "score", "undefended_logits"]
    return OnnxEngine(store / "models" / "digits" / "2" / "model.onnx", outputs, threads=1, noise=False)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
async def test_an_image_as_the_body_gets_its_prediction_with_every_field(visitor, alone, dark, bright, file_of, form):
    for pixels, verdict in ((dark(1)[0], "accepted"), (bright(1)[0], "alert")):
        file = file_of(pixels, form)
        image = decode_pixels(file, InputSpec(shape=(1, 16, 16), mode="L"), max_pixels=10_000)
        expected = alone.predict(image[np.newaxis])
        answer = await visitor.predict("digits", file, headers={"content-type": f"image/{form.lower()}"})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert (body["model"], body["version"]) == ("digits", "2")
        (prediction,) = body["predictions"]
        assert set(prediction) == {
            *("label", "class_index", "probabilities", "verdict", "alert_id", "score", "p_value", "undefended_label"),
        }
        assert prediction["verdict"] == verdict
        assert prediction["class_index"] == expected.logits[0].argmax()
        assert prediction["label"] == LABELS[prediction["class_index"]]
        assert prediction["undefended_label"] == LABELS[expected.undefended_logits[0].argmax()]
        assert prediction["score"] == pytest.approx(float(expected.scores[0]), abs=1e-4)
        exponentials = np.exp(expected.logits[0] - expected.logits[0].max())
        assert prediction["probabilities"] == pytest.approx((exponentials / exponentials.sum()).tolist(), abs=1e-4)
        assert (prediction["alert_id"] is None) == (verdict == "accepted")


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "text/plain", "application/json"])
async def test_the_bytes_tell_what_an_image_is_whatever_the_content_type_says(visitor, dark, file_of, content_type):
    headers = {"content-type": content_type} if content_type else {}
    answer = await visitor.predict("digits", file_of(dark(1)[0]), headers=headers)
    assert answer.status_code == 200, answer.text


async def test_a_form_of_several_images_is_answered_in_its_order(visitor, dark, bright, file_of):
    pixels = np.concatenate([dark(3), bright(2), dark(1, seed=5)])
    forms = ["PNG", "WEBP", "PNG", "PNG", "JPEG", "PNG"]
    files = [file_of(image, form, lossless=True) for image, form in zip(pixels, forms, strict=True)]
    together = await visitor.predictions("digits", *files)
    alone = [(await visitor.predictions("digits", file))[0] for file in files]
    for one, among in zip(alone, together, strict=True):
        assert among["score"] == pytest.approx(one["score"], abs=1e-4)
        assert (among["label"], among["verdict"]) == (one["label"], one["verdict"])
    assert [prediction["verdict"] for prediction in together] == ["accepted"] * 3 + ["alert"] * 2 + ["accepted"]


async def test_a_form_may_name_its_type_in_capitals(visitor, dark, file_of):
    file = file_of(dark(1)[0])
    body = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + file + b"\r\n--edge--\r\n"
    answer = await visitor.predict("digits", body, headers={"content-type": "Multipart/Form-Data; boundary=edge"})
    assert answer.status_code == 200, answer.text


async def test_both_protocols_give_one_image_the_same_answer(visitor, dark, file_of):
    pixels = dark(4)
    outputs = await visitor.outputs("digits", pixels, ["label", "probabilities", "score"])
    predictions = await visitor.predictions("digits", *map(file_of, pixels))
    assert [prediction["label"] for prediction in predictions] == outputs["label"]
    for prediction, probabilities in zip(predictions, outputs["probabilities"], strict=True):
        assert prediction["probabilities"] == pytest.approx(probabilities.tolist(), abs=1e-5)


async def test_a_colour_photo_with_an_orientation_is_seen_upright(visitor, dark, file_of):
    upright = Image.fromarray(dark(1)[0, 0])
    turned, buffer = upright.transpose(Image.Transpose.ROTATE_90).convert("RGB"), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned.save(buffer, "PNG", exif=exif)
    (seen,) = await visitor.predictions("digits", buffer.getvalue())
    (expected,) = await visitor.predictions("digits", file_of(dark(1)[0]))
    assert seen["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert seen["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


async def test_the_request_id_comes_back_or_is_made(visitor, dark, file_of):
    file = file_of(dark(1)[0])
    given = await visitor.predict("digits", file, headers={"x-request-id": "photo-7"})
    assert given.headers["x-request-id"] == "photo-7"
    first, second = [(await visitor.predict("digits", file)).headers["x-request-id"] for _ in range(2)]
    assert len(first) == len(second) == 36
    assert first != second


async def test_a_classifier_without_a_defense_says_undefended(visitor, dark, bright, file_of):
    predictions = await visitor.predictions("bare", file_of(dark(1)[0]), file_of(bright(1)[0]))
    for prediction in predictions:
        assert prediction["verdict"] == "undefended"
        assert prediction["label"] in LABELS
        absent = [prediction[field] for field in ("alert_id", "score", "p_value", "undefended_label")]
        assert absent == [None] * 4
    outputs = await visitor.outputs("bare", np.concatenate([dark(1), bright(1)]))
    assert outputs["verdict"] == ["undefended"] * 2
    assert outputs["label"] == [prediction["label"] for prediction in predictions]
