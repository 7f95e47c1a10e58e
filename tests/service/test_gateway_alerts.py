"""Alerts through the gateway: what is recorded, who may read it, and that none is lost."""

import hashlib
import io
import json
import sqlite3
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from model_store import Store


async def test_a_row_states_the_facts_of_its_request(gateway, store, dark, bright, file_of):
    before = datetime.now(UTC)
    files = [file_of(dark(1)[0]), file_of(bright(1)[0], "JPEG"), file_of(bright(1, seed=1)[0], "WEBP")]
    async with gateway(client="192.0.2.7", operators="192.0.2.0/24", undefended_answer=True, disclose="all") as visitor:
        answer = await visitor.predict("digits", *files, headers={"x-request-id": "batch-1"})
        predictions = answer.json()["predictions"]
        rows = await visitor.alerts(2)
    assert [row["index"] for row in rows] == [2, 1], "newest first"
    for row, media_type in zip(rows, ("image/webp", "image/jpeg"), strict=True):
        prediction, file = predictions[row["index"]], files[row["index"]]
        created = datetime.fromisoformat(row.pop("created"))
        assert before <= created <= datetime.now(UTC)
        assert created.utcoffset() == timedelta(0)
        assert prediction["p_value"] == 0.01, "above all of the 99 calibration images"
        assert row == {
            "id": prediction["alert_id"],
            "seq": row["index"],
            "model": "digits",
            "version": 2,
            "request_id": "batch-1",
            "index": row["index"],
            "client": "192.0.2.7",
            "class_index": prediction["class_index"],
            "label": prediction["label"],
            "undefended_class_index": ["zero", "one", "two", "three"].index(prediction["undefended_label"]),
            "score": prediction["score"],
            "threshold": Store.open(store / "models").manifest("digits", 2).threshold,
            "p_value": prediction["p_value"],
            "mode": "flag",
            "sha256": hashlib.sha256(file).hexdigest(),
            "media_type": media_type,
            "image_kept": True,
            "status": "new",
        }


@pytest.mark.parametrize(
    ("id", "headers", "known_as"),
    [
        ("from-the-message", {}, "from-the-message"),
        ("from-the-message", {"x-request-id": "from-the-header"}, "from-the-header"),
        ("a\0b" + "c" * 300, {}, "ab" + "c" * 125),
    ],
)
async def test_an_alert_is_found_by_the_id_of_its_message(gateway, bright, id, headers, known_as):
    image = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 16, 16], "data": bright(1).ravel().tolist()}
    async with gateway() as visitor:
        content = json.dumps({"id": id, "inputs": [image]})
        answer = await visitor.http.post("/v2/models/digits/infer", content=content, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == known_as
        (row,) = await visitor.alerts(1, request_id=known_as)
    assert row["request_id"] == known_as


async def test_without_the_bare_pass_the_bare_answer_is_not_on_record(gateway, bright):
    async with gateway() as visitor:
        await visitor.outputs("digits", bright(1))
        (row,) = await visitor.alerts(1)
    assert row["undefended_class_index"] is None


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
async def test_an_alerted_image_is_kept_byte_for_byte(gateway, bright, file_of, form):
    file = file_of(bright(1)[0], form)
    async with gateway() as visitor:
        (prediction,) = await visitor.predictions("digits", file)
        row = await visitor.recorded(prediction["alert_id"])
        kept = await visitor.http.get(f"/v1/alerts/{row['id']}/image")
    assert kept.content == file
    assert kept.headers["content-type"] == f"image/{form.lower()}"
    assert row["sha256"] == hashlib.sha256(file).hexdigest()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
async def test_an_alerted_tensor_is_kept_exactly(gateway, bright, binary, dtype):
    pixels = bright(2)
    if dtype is np.float32:
        pixels = (pixels / 255 + 1e-6).astype(np.float32).clip(0, 1)
    async with gateway() as visitor:
        answer = await visitor.infer("digits", pixels, binary=binary)
        ids = answer.json()["parameters"]["alert_ids"].split(",")
        for row, alert_id in enumerate(ids):
            alert = await visitor.recorded(alert_id)
            kept = await visitor.http.get(f"/v1/alerts/{alert_id}/image")
            assert kept.headers["content-type"] == "application/x-npy"
            array = np.load(io.BytesIO(kept.content), allow_pickle=False)
            np.testing.assert_array_equal(array, pixels[row])
            assert array.dtype == dtype
            assert (alert["index"], alert["sha256"]) == (row, hashlib.sha256(kept.content).hexdigest())


async def test_inputs_are_not_kept_when_that_is_switched_off(gateway, bright, tmp_path):
    async with gateway(inputs_max_bytes=0) as visitor:
        await visitor.outputs("digits", bright(1))
        (row,) = await visitor.alerts(1)
        answer = await visitor.http.get(f"/v1/alerts/{row['id']}/image")
    assert row["image_kept"] is False
    assert answer.status_code == 404
    assert "is not kept" in answer.json()["error"]
    assert not list((tmp_path / "inputs").rglob("*.npy"))


async def test_alerts_are_found_by_every_filter(gateway, bright, file_of):
    async with gateway(models=("digits", "fragile"), undefended_answer=True) as visitor:
        for number in range(3):
            headers = {"x-request-id": f"r-{number}"}
            await visitor.predict("digits", file_of(bright(1, seed=number)[0]), headers=headers)
        low = bright(1)
        low[:, 0, 0, :2] = 0
        assert (await visitor.outputs("fragile", low))["verdict"] == ["alert"]
        rows = await visitor.alerts(4)
        digits = [row for row in rows if row["model"] == "digits"]
        assert [row["id"] for row in await visitor.alerts(3, model="digits")] == [row["id"] for row in digits]
        assert len(await visitor.alerts(1, model="fragile", version=1)) == 1
        await visitor.alerts(0, model="digits", version=1)
        for label in ("zero", "one", "two", "three"):
            await visitor.alerts([row["label"] for row in digits].count(label), label=label)
        await visitor.alerts(1, request_id="r-1")
        await visitor.alerts(4, client="127.0.0.1")
        await visitor.alerts(0, client="127.0.0.2")
        await visitor.alerts(4, status="new")
        await visitor.alerts(0, status="closed")
        scores = sorted(row["score"] for row in digits)
        await visitor.alerts(1, model="digits", minimum_score=scores[-1])
        assert {row["model"] for row in await visitor.alerts(3, maximum_p_value=0.01)} == {"digits"}
        await visitor.alerts(0, maximum_p_value=0.009)
        second = rows[-2]["created"]
        assert {row["created"] for row in await visitor.alerts(3, since=second)} == {row["created"] for row in rows[:3]}
        assert [row["created"] for row in await visitor.alerts(1, until=second)] == [rows[-1]["created"]]


async def test_pages_meet_every_alert_once_while_new_ones_come(gateway, bright):
    async with gateway() as visitor:
        await visitor.infer("digits", bright(7))
        await visitor.alerts(7)
        seen, after, pages = [], "", 0
        while after is not None:
            page = (await visitor.http.get(f"/v1/alerts?limit=3{after}")).json()
            seen += [row["seq"] for row in page["alerts"]]
            pages += 1
            await visitor.infer("digits", bright(1, seed=pages))
            await visitor.alerts(7 + pages)
            after = f"&after={page['next']}" if page["next"] is not None else None
    assert seen == [7, 6, 5, 4, 3, 2, 1]
    assert pages == 3


@pytest.mark.parametrize("client", ["192.0.2.7", "2001:db8::1", "testclient"])
async def test_only_operators_may_read_alerts(gateway, bright, client):
    async with gateway(client=client) as visitor:
        answer = await visitor.infer("digits", bright(1))
        alert_id = answer.json()["parameters"]["alert_ids"]
        for path in ("", "?limit=0", f"/{alert_id}", f"/{alert_id}/image", "/none"):
            answer = await visitor.http.get(f"/v1/alerts{path}")
            assert answer.status_code == 403
            assert answer.json() == {"error": f"Alerts are for operators only, and {client} is not in their networks."}
        assert (await visitor.http.get("/metrics")).status_code == 200


@pytest.mark.parametrize(
    ("client", "operators"),
    [("127.0.0.1", None), ("::1", None), ("10.1.2.3", "10.0.0.0/8, 192.0.2.1"), ("2001:db8::1", "2001:db8::/32")],
)
async def test_operators_networks_are_loopback_unless_set(gateway, client, operators):
    given = {} if operators is None else {"operators": operators}
    async with gateway(client=client, **given) as visitor:
        assert await visitor.alerts(0) == []


async def test_a_database_that_does_not_answer_costs_the_alert_pages_alone(gateway, tmp_path, dark):
    async with gateway() as visitor:
        with sqlite3.connect(tmp_path / "alerts.db") as connection:
            connection.execute("DROP TABLE alerts")
        connection.close()
        answer = await visitor.http.get("/v1/alerts")
        assert answer.status_code == 503
        assert answer.json()["error"].startswith("The alert log could not be read: ")
        assert (await visitor.infer("digits", dark(1))).status_code == 200


async def test_every_alert_verdict_has_a_row_after_the_stop(gateway, bright, tmp_path):
    async with gateway() as visitor:
        told = []
        for number in range(10):
            answer = await visitor.infer("digits", bright(5, seed=number))
            told += answer.json()["parameters"]["alert_ids"].split(",")
    with sqlite3.connect(tmp_path / "alerts.db") as connection:
        rows = [row for (row,) in connection.execute("SELECT id FROM alerts ORDER BY seq")]
    connection.close()
    assert rows == told
    assert len(rows) == 50


async def test_alerts_outlive_a_restart_and_the_order_goes_on(gateway, bright):
    async with gateway() as visitor:
        await visitor.infer("digits", bright(2))
    async with gateway() as visitor:
        await visitor.infer("digits", bright(1))
        assert [row["seq"] for row in await visitor.alerts(3)] == [3, 2, 1]
