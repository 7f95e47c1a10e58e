"""The counters move by what happened, and never tell who asked."""

import numpy as np


async def test_requests_predictions_alerts_and_changes_are_counted(gateway, dark, bright, file_of):
    pixels = np.concatenate([dark(3), bright(2)])
    async with gateway(undefended_answer=True) as visitor:
        outputs = await visitor.outputs("digits", pixels, ["label", "class_index", "undefended_class_index"])
        await visitor.predictions("digits", *map(file_of, pixels))
        alerted = outputs["label"][3:]
        changed = int((outputs["class_index"] != outputs["undefended_class_index"]).sum())
        assert changed > 0
        requests = {"model": "digits", "version": "2"}
        assert await visitor.metric("requests_total", **requests, outcome="ok") == 2
        assert await visitor.metric("predictions_total", model="digits", verdict="accepted") == 6
        assert await visitor.metric("predictions_total", model="digits", verdict="alert") == 4
        for label in set(alerted):
            assert await visitor.metric("alerts_total", **{"model": "digits", "class": label}) == 2 * alerted.count(
                label
            )
        assert await visitor.metric("label_changes_total", model="digits") == 2 * changed
        assert await visitor.metric("detector_score_count", model="digits") == 10
        assert await visitor.metric("request_seconds_count", model="digits") == 2
        for stage in ("decode", "queue", "purify_classify_inspect", "encode"):
            assert await visitor.metric("stage_seconds_count", stage=stage) == 2, stage
        assert await visitor.metric("batch_size_sum", model="digits") == 10
        assert await visitor.metric("queue_depth", model="digits") == 0
        await visitor.alerts(4)
        assert await visitor.metric("alerts_written_total") == 4
        assert await visitor.metric("alert_queue_depth") == 0
        assert await visitor.metric("alert_write_failures_total") == 0


async def test_shadow_counts_an_alert_that_no_client_is_told(gateway, bright):
    async with gateway(mode="shadow") as visitor:
        await visitor.outputs("digits", bright(2))
        (first, second) = await visitor.alerts(2)
        assert await visitor.metric("predictions_total", model="digits", verdict="accepted") == 2
        assert await visitor.metric("predictions_total", model="digits", verdict="alert") == 0
        counted = [
            await visitor.metric("alerts_total", **{"model": "digits", "class": label})
            for label in {first["label"], second["label"]}
        ]
    assert sum(counted) == 2


async def test_refusals_are_counted_by_reason_and_outcome(gateway, dark, file_of):
    async with gateway(disclose="label") as visitor:
        await visitor.infer("digits", dark(1), ["feelings"])
        await visitor.infer("digits", dark(1), ["score"])
        await visitor.infer("digits", dark(1)[:, :, :5])
        await visitor.predict("digits", b"no image")
        await visitor.http.post("/v2/models/digits/infer", content=b"{")
        await visitor.http.post(
            "/v1/models/digits/predict", content=b"--", headers={"content-type": "multipart/form-data"}
        )
        await visitor.infer("letters", dark(1))
        reasons = {
            "OutputUnknown": 1,
            "OutputWithheld": 1,
            "TensorRefused": 1,
            "ImageRefused": 2,
            "OipMalformed": 1,
            "ModelNotFound": 1,
        }
        for reason, count in reasons.items():
            assert await visitor.metric("rejected_total", reason=reason) == count, reason
            if reason != "ModelNotFound":
                labels = {"model": "digits", "version": "2", "outcome": reason}
                assert await visitor.metric("requests_total", **labels) == count, reason
        assert await visitor.metric("predictions_total", model="digits", verdict="accepted") == 0


async def test_the_versions_in_service_are_told_apart_by_digest(gateway):
    async with gateway(models=("digits", "bare"), modes={"digits": "enforce"}) as visitor:
        for model in (await visitor.http.get("/v1/models")).json()["models"]:
            labels = {name: model[key] for name, key in (("model", "name"), ("version", "version"), ("kind", "kind"))}
            assert await visitor.metric("model_info", **labels, mode=model["mode"], digest=model["digest"]) == 1


async def test_no_client_and_no_request_id_is_ever_a_label(gateway, bright, file_of):
    async with gateway(client="192.0.2.77", operators="192.0.2.0/24") as visitor:
        file = file_of(bright(1)[0])
        await visitor.predict("digits", file, headers={"x-request-id": "secret-request"})
        await visitor.alerts(1)
        answer = await visitor.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'portcullis_alerts_total{class="' in answer.text
    assert "192.0.2.77" not in answer.text
    assert "secret-request" not in answer.text


async def test_two_gateways_in_one_process_count_apart(gateway, dark, tmp_path):
    async with gateway() as one, gateway(database=f"sqlite+aiosqlite:///{tmp_path / 'other.db'}") as other:
        await one.outputs("digits", dark(1))
        assert await one.metric("predictions_total", model="digits", verdict="accepted") == 1
        assert await other.metric("predictions_total", model="digits", verdict="accepted") == 0
