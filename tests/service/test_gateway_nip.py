"""NIP in service: what a gateway answers of a version without a detector, and what it makes of a damaged pool."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from defenses.attacks import attack, craft
from defenses.checkpoint import load_protected
from defenses.classifier import Classifier
from defenses.protected import Output
from model_store import Store
from service.datasets import load_dataset

POOL = Path("models/digits/2/checkpoint/inverse_perturbation.safetensors")
GRAPH = Path("models/digits/2/model.onnx")


@pytest.fixture(scope="module")
def sent(nip_store) -> np.ndarray:
    """Sixteen clean test images and sixteen that fool the bare classifier, uint8 (32, 1, 32, 32)."""
    manifest = Store.open(nip_store / "models").manifest("digits", 2)
    test = load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0).test
    classifier = Classifier.load(nip_store / "models/digits/1/model.onnx").eval()
    images, targets = torch.from_numpy(test.images), torch.from_numpy(test.targets)
    made = craft(
        attack("deepfool:steps=8"),
        classifier,
        images,
        targets,
        limit=80,
        device=torch.device("cpu"),
        seed=0,
        progress=lambda done, total: None,
    )
    fooling = made.rounded[made.fooled_rounded]
    assert len(fooling) >= 16
    return torch.cat([images[:16], fooling[:16]]).numpy()


@pytest.fixture(scope="module")
def expected(nip_store, sent) -> Output:
    """What the published checkpoint says of them."""
    classifier = Classifier.load(nip_store / "models/digits/1/model.onnx").eval()
    protected = load_protected(classifier, nip_store / "models/digits/2/checkpoint")
    with torch.no_grad():
        return protected(torch.from_numpy(sent).float() / 255)


async def test_a_purified_answer_is_accepted_whatever_it_is(gateway, nip_store, sent, expected, file_of):
    labels = [str(index) for index in expected.logits.argmax(1).tolist()]
    bare = [str(index) for index in expected.undefended_logits.argmax(1).tolist()]
    assert labels != bare, "the defense has to change an answer for this to show anything"
    async with gateway(store=nip_store, undefended_answer=True) as visitor:
        found = await visitor.predictions("digits", *map(file_of, sent[:8]))
        outputs = await visitor.outputs(
            "digits", sent, ("label", "verdict", "logits", "purified", "undefended_class_index")
        )
        await visitor.alerts(0)
        assert await visitor.metric("predictions_total", model="digits", verdict="accepted") == 8 + 32
    assert [each["label"] for each in found] == labels[:8]
    assert [each["undefended_label"] for each in found] == bare[:8]
    assert {(each["verdict"], each["alert_id"], each["score"], each["p_value"]) for each in found} == {
        ("accepted", None, None, None)
    }
    assert outputs["label"] == labels
    assert outputs["verdict"] == ["accepted"] * 32
    assert outputs["undefended_class_index"].astype(str).tolist() == bare
    np.testing.assert_allclose(outputs["purified"], expected.purified, atol=1e-5)
    assert np.abs(outputs["purified"] - sent / 255).max() > 1e-4
    np.testing.assert_allclose(outputs["logits"], expected.logits, atol=1e-3)


async def test_the_metadata_tells_of_no_score_and_no_threshold(gateway, nip_store, sent):
    async with gateway(store=nip_store) as visitor:
        (info,) = (await visitor.http.get("/v1/models")).json()["models"]
        metadata = (await visitor.http.get("/v2/models/digits")).json()
        refused = await visitor.infer("digits", sent[:1], ("score",))
    assert (info["kind"], info["version"], info["defended"], info["threshold"]) == ("nip", "2", True, None)
    assert (info["false_positive_rate_budget"], info["false_positive_rate_realised"]) == (None, None)
    assert info["metrics"] == Store.open(nip_store / "models").manifest("digits", 2).metrics
    names = [output["name"] for output in metadata["outputs"]]
    assert names == ["label", "class_index", "verdict", "logits", "probabilities", "purified"]
    assert refused.status_code == 400
    assert "No output 'score' is computed here" in refused.json()["error"]


async def test_a_client_is_told_no_more_than_the_settings_disclose(gateway, nip_store, sent, expected):
    async with gateway(store=nip_store, disclose="label") as visitor:
        withheld = await visitor.infer("digits", sent[:1], ("purified",))
        outputs = await visitor.outputs("digits", sent)
    assert withheld.status_code == 403
    assert outputs["class_index"].tolist() == expected.logits.argmax(1).tolist()
    assert set(outputs["verdict"]) == {"accepted"}


@pytest.mark.parametrize(("mode", "which"), [("enforce", "logits"), ("shadow", "undefended_logits")])
async def test_no_mode_withholds_an_answer(gateway, nip_store, sent, expected, mode, which):
    async with gateway(store=nip_store, mode=mode) as visitor:
        outputs = await visitor.outputs("digits", sent)
    assert outputs["class_index"].tolist() == getattr(expected, which).argmax(1).tolist()
    assert set(outputs["verdict"]) == {"accepted"}


@pytest.mark.parametrize("damaged", [POOL, GRAPH], ids=["checkpoint", "graph"])
async def test_a_damaged_pool_is_refused_and_the_version_in_service_stays(
    gateway, nip_store, tmp_path, sent, expected, damaged
):
    store = tmp_path / "store"
    shutil.copytree(nip_store, store)
    answers = expected.logits.argmax(1).tolist()
    async with gateway(store=store) as visitor:
        assert (await visitor.outputs("digits", sent))["class_index"].tolist() == answers
        content = bytearray((store / damaged).read_bytes())
        content[len(content) // 2] ^= 1
        (store / damaged).chmod(0o644)
        (store / damaged).write_bytes(content)
        assert (await visitor.outputs("digits", sent))["class_index"].tolist() == answers
    async with gateway(store=store, models=("digits", "digits@1"), ready=False) as visitor:
        for _ in range(6000):
            states = (await visitor.http.post("/v2/repository/index")).json()
            if len(states) == 2:
                break
        refused = await visitor.infer("digits", sent[:1])
    by_version = {state["version"]: state for state in states}
    assert by_version["1"]["state"] == "READY"
    assert by_version["2"]["state"] == "UNAVAILABLE"
    told = f"Model 'digits' version 2 is corrupt: '{damaged.relative_to('models/digits/2')}' should be of the SHA-256"
    assert told in by_version["2"]["reason"]
    assert refused.status_code == 503
    assert told in refused.json()["error"]
