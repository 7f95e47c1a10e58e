"""Queues, times and sizes have an end, and what lies beyond it gets an answer of its own."""

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator

import numpy as np
import pytest


async def test_a_full_queue_answers_429_at_once_and_everyone_else_is_served(gateway, dark):
    async with gateway(models=("slow",), max_batch=1, queue_images=3) as visitor:
        answers = await asyncio.gather(*(visitor.infer("slow", dark(1, seed=n)) for n in range(10)))
        counted = Counter(answer.status_code for answer in answers)
        assert set(counted) == {200, 429}
        assert counted[200] >= 3
        for answer in answers:
            if answer.status_code == 429:
                assert answer.headers["retry-after"] == "1"
                assert "images wait for model 'slow' already and at most 3 may; try again." in answer.json()["error"]
        refused = counted[429]
        labels = {"model": "slow", "version": "1"}
        assert await visitor.metric("rejected_total", reason="QueueFull") == refused
        assert await visitor.metric("requests_total", **labels, outcome="QueueFull") == refused
        assert await visitor.metric("requests_total", **labels, outcome="ok") == 10 - refused
        assert await visitor.metric("predictions_total", model="slow", verdict="accepted") == 10 - refused
        assert (await visitor.infer("slow", dark(1))).status_code == 200


async def test_an_idle_model_takes_a_request_larger_than_its_queue(gateway, dark):
    async with gateway(queue_images=2, max_batch=2, max_images=9) as visitor:
        outputs = await visitor.outputs("digits", dark(9), ["logits"])
    async with gateway() as visitor:
        np.testing.assert_allclose(
            (await visitor.outputs("digits", dark(9), ["logits"]))["logits"], outputs["logits"], atol=1e-4
        )


async def test_alerts_that_cannot_be_written_hold_their_requests_then_refuse_them(gateway, dark, bright, tmp_path):
    async with gateway(alert_queue=2, alert_wait_seconds=0.1) as visitor:
        blocker = sqlite3.connect(tmp_path / "alerts.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        accepted = await visitor.infer("digits", bright(2))
        assert accepted.status_code == 200
        assert await visitor.metric("alert_queue_depth") == 2
        refused = await visitor.infer("digits", bright(1, seed=1))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"].startswith("No room for 1 more alerts within 0.1 s: 2 are waiting")
        assert (await visitor.infer("digits", dark(1))).status_code == 200, "clean images need no alert log"
        assert await visitor.metric("rejected_total", reason="AlertQueueFull") == 1
        assert await visitor.metric("predictions_total", model="digits", verdict="alert") == 2
        waiting = asyncio.create_task(visitor.infer("digits", bright(1, seed=2)))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        blocker.execute("ROLLBACK")
        blocker.close()
        rows = await visitor.alerts(2 + ((await waiting).status_code == 200))
        assert {row["id"] for row in rows} >= set(accepted.json()["parameters"]["alert_ids"].split(","))
        assert (await visitor.infer("digits", bright(1, seed=3))).status_code == 200
    assert len(rows) in (2, 3)


async def test_a_request_that_takes_too_long_is_given_up_and_leaves_the_queue(gateway, dark):
    async with gateway(models=("slow", "digits"), max_batch=1, request_seconds=0.4) as visitor:
        answer = await visitor.infer("slow", dark(20))
        assert answer.status_code == 504
        assert answer.json() == {"error": "The request was given up after 0.4 s."}
        assert await visitor.metric("queue_depth", model="slow") == 0
        labels = {"model": "slow", "version": "1", "outcome": "RequestTimedOut"}
        assert await visitor.metric("requests_total", **labels) == 1
        assert (await visitor.infer("digits", dark(1))).status_code == 200


async def test_a_request_is_given_up_when_its_own_time_is_over(gateway, dark, file_of):
    async with gateway(models=("slow", "digits"), max_batch=1) as visitor:
        busy = asyncio.create_task(visitor.infer("slow", dark(4)))
        await asyncio.sleep(0.02)
        tensor = await visitor.infer("slow", dark(1), parameters={"timeout": 50_000})
        image = await visitor.predict("slow", file_of(dark(1)[0]), params={"timeout": 50_000})
        for answer in (tensor, image):
            assert answer.status_code == 504
            assert answer.json() == {"error": "The request was given up after 0.05 s."}
        at_once = await visitor.predict("slow", file_of(dark(1)[0]), params={"timeout": 1})
        assert (at_once.status_code, at_once.json()["error"]) == (504, "The request was given up after 1e-06 s.")
        for enough in (0, 60_000_000, 2**64 - 1):
            assert (await visitor.infer("digits", dark(1), parameters={"timeout": enough})).status_code == 200
            assert (await visitor.predict("digits", file_of(dark(1)[0]), params={"timeout": enough})).status_code == 200
        assert (await busy).status_code == 200
        labels = {"model": "slow", "version": "1", "outcome": "RequestTimedOut"}
        assert await visitor.metric("requests_total", **labels) == 3
        assert await visitor.metric("queue_depth", model="slow") == 0
        assert await visitor.metric("batch_size_sum", model="slow") == 4, "what was given up was not computed"


async def test_the_gateways_own_bound_holds_for_a_request_that_allows_itself_more(gateway, dark):
    async with gateway(models=("slow",), max_batch=1, request_seconds=0.4) as visitor:
        answer = await visitor.infer("slow", dark(20), parameters={"timeout": 60_000_000})
        assert (answer.status_code, answer.json()["error"]) == (504, "The request was given up after 0.4 s.")


@pytest.mark.parametrize("given", [-1, 1.5, True, "soon", None, 2**64])
async def test_a_timeout_that_is_no_number_of_microseconds_is_refused(gateway, dark, file_of, given):
    async with gateway() as visitor:
        tensor = await visitor.infer("digits", dark(1), parameters={"timeout": given})
        assert tensor.status_code == 400
        assert "'timeout' of the request must be a whole number of microseconds from 0" in tensor.json()["error"]
        image = await visitor.predict("digits", file_of(dark(1)[0]), params={"timeout": given})
        assert image.status_code == 400
        assert "'timeout' must be a whole number of microseconds from 0, not '" in image.json()["error"]


async def test_no_more_requests_wait_to_be_decoded_than_may(gateway, dark):
    async with gateway(queue_decodes=1, queue_images=10_000) as visitor:
        request = visitor.request_of(dark(250), binary=False)
        answers = await asyncio.gather(*(visitor.http.post("/v2/models/digits/infer", **request) for _ in range(30)))
        counted = Counter(answer.status_code for answer in answers)
        assert set(counted) == {200, 429}
        assert counted[200] >= 3
        for answer in answers:
            if answer.status_code == 429:
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"] == "1 requests wait to be decoded already and at most 1 may; try again."
        assert await visitor.metric("rejected_total", reason="DecodeQueueFull") == counted[429]
        assert (await visitor.infer("digits", dark(250), binary=False)).status_code == 200


async def test_a_full_queue_refuses_an_image_before_it_is_decoded(gateway, dark, file_of):
    async with gateway(models=("slow",), max_batch=1, queue_images=1) as visitor:
        busy = []
        for metric in ("batch_size_count", "queue_depth"):
            busy.append(asyncio.create_task(visitor.infer("slow", dark(1))))
            for _ in range(1000):
                if await visitor.metric(metric, model="slow"):
                    break
                await asyncio.sleep(0.001)
        answer = await visitor.predict("slow", b"no image at all")
        assert answer.status_code == 429
        assert await visitor.metric("stage_seconds_count", stage="decode") == 2
        assert {(await task).status_code for task in busy} == {200}


@pytest.mark.parametrize("path", ["/v2/models/digits/infer", "/v1/models/digits/predict"])
async def test_a_body_that_does_not_come_is_not_waited_for(gateway, path):
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    async with gateway(request_seconds=0.3) as visitor:
        answer = await visitor.http.post(path, content=trickle())
        assert answer.status_code == 504


async def test_a_client_that_leaves_is_not_counted_as_answered(gateway, dark):
    async with gateway(models=("slow",), max_batch=1) as visitor:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(visitor.infer("slow", dark(20)), 0.3)
        labels = {"model": "slow", "version": "1"}
        assert await visitor.metric("requests_total", **labels, outcome="CancelledError") == 1
        assert await visitor.metric("requests_total", **labels, outcome="ok") == 0
        assert await visitor.metric("queue_depth", model="slow") == 0
        assert (await visitor.infer("slow", dark(1))).status_code == 200


LIMIT = 4096


@pytest.mark.parametrize("path", ["/v2/models/digits/infer", "/v1/models/digits/predict"])
@pytest.mark.parametrize("content_type", ["application/octet-stream", "multipart/form-data; boundary=edge"])
async def test_a_body_over_the_limit_is_refused_before_it_is_read(gateway, path, content_type):
    taken = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield bytes(1024)

    headers = {"content-type": content_type}
    async with gateway(max_body_bytes=LIMIT) as visitor:
        declared = await visitor.http.post(path, content=bytes(LIMIT + 1), headers=headers)
        lying = await visitor.http.post(path, content=chunks(), headers=headers | {"content-length": "9" * 18})
        assert taken == 0
        chunked = await visitor.http.post(path, content=chunks(), headers=headers)
        assert taken == 5
        for answer, size in ((declared, LIMIT + 1), (lying, int("9" * 18)), (chunked, LIMIT + 1024)):
            assert answer.status_code == 413
            assert answer.json() == {"error": f"Expected a body of at most {LIMIT} bytes, got {size} or more."}
        assert await visitor.metric("rejected_total", reason="BodyTooLarge") == 3
        assert (await visitor.http.post(path, content=bytes(LIMIT), headers=headers)).status_code == 400


async def test_a_body_at_the_limit_is_served(gateway, dark):
    async with gateway() as visitor:
        request = visitor.request_of(dark(10))
    async with gateway(max_body_bytes=len(request["content"])) as visitor:
        assert (await visitor.http.post("/v2/models/digits/infer", **request)).status_code == 200


async def test_too_many_images_or_pixels_are_refused(gateway, dark, file_of):
    async with gateway(max_images=2, max_pixels=255) as visitor:
        many = await visitor.infer("digits", dark(3))
        assert (many.status_code, many.json()) == (400, {"error": "The tensor must hold 1 to 2 images, not 3."})
        form = await visitor.predict("digits", *map(file_of, dark(3)))
        assert form.status_code == 400
        assert "Maximum number of files is 2" in form.json()["error"]
        large = await visitor.predict("digits", file_of(dark(1)[0]))
        assert large.status_code == 400
        assert "at most 255 pixels" in large.json()["error"]
