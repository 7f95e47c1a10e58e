import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from loadtest.competition import compete
from loadtest.connections import Message
from loadtest.contenders import Contender
from loadtest.racing import race
from loadtest.ranking import best_settings, ratios
from loadtest.serving import free_port, running

IMAGES = np.zeros((2, 1, 4, 4), np.uint8)

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        if self.path == "/strange":
            self.wfile.write(b"nothing of HTTP\\r\\n\\r\\n")
            self.close_connection = True
        elif self.path == "/fatal":
            print("the end of it", flush=True)
            os._exit(7)
        else:
            self.do_GET()

    def log_message(self, *told):
        pass

ThreadingHTTPServer.request_queue_size = 64
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def contender(body: str) -> Contender:
    """One that asks the server above in a way that it answers, or not, by the path."""
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    return Contender(
        "one", "alone", body, lambda _: Message(f"/{body}", (), b""), partial(running, command, port, ready="/")
    )


@pytest.fixture(scope="module")
def raced():
    bodies = ("good", "strange", "fatal", "better")
    told: list[str] = []
    contenders = [contender(body) for body in bodies]
    loads = dict.fromkeys(contenders, (1,))
    return race(loads, IMAGES, seconds=0.1, rounds=2, told=told.append), told


def test_who_fails_costs_nobody_else_a_row(raced):
    result, _ = raced
    rows = [(row["round"], row["setting"], set(row["statuses"])) for row in result["runs"]]
    assert rows == [(number, f"{body}, alone", {"200"}) for number in (0, 1) for body in ("good", "better")]


def test_what_is_not_http_and_a_server_that_ends_are_told_by_contender(raced):
    result, told = raced
    assert set(result["failures"]) == {"one, strange, alone", "one, fatal, alone"}
    assert "In round 1 of 2: strange, alone gave no answer to an image" in result["failures"]["one, strange, alone"]
    assert result["failures"]["one, fatal, alone"].startswith("In round 1 of 2: fatal, alone gave no answer")
    assert sum("fatal" in line for line in told) == 1, "who failed is not tried again"


def test_who_fails_in_a_later_round_is_not_ranked(tmp_path):
    mark = tmp_path / "begun"
    once = f"import pathlib; mark = pathlib.Path({str(mark)!r}); ran = mark.exists(); mark.touch()\n"
    port = free_port()
    fragile = [sys.executable, "-c", once + "if ran: raise SystemExit(4)\n" + SERVER, str(port)]
    contenders = [
        Contender("steady", "alone", "good", contender("good").message, contender("good").open),
        Contender("fragile", "alone", "good", contender("good").message, partial(running, fragile, port, ready="/")),
    ]
    result = race(dict.fromkeys(contenders, (1,)), IMAGES, seconds=0.1, rounds=2, told=lambda _: None)
    assert [(row["server"], row["round"]) for row in result["runs"] if row["server"] == "fragile"] == [("fragile", 0)]
    assert result["failures"]["fragile, alone"].startswith("In round 2 of 2: ")
    best = best_settings(result["runs"], rounds=2)
    assert [(row["server"], len(row["rounds"])) for row in best] == [("steady", 2)]
    assert ratios(best, ["steady"]) == []


def test_a_competition_measures_the_best_of_a_trial_and_leaves_out_who_failed_in_it():
    bodies = {"good": False, "strange": False, "better": False, "best": False, "bare": True}
    contenders = [replace(contender(body), raw=raw) for body, raw in bodies.items()]
    told: list[str] = []
    result = compete(
        contenders,
        IMAGES,
        ["one"],
        **{"concurrencies": (1, 2), "trial_seconds": 0.1, "seconds": 0.2, "rounds": 2, "told": told.append},
    )
    assert "5 settings are tried" in told[0]
    assert any("settings are measured at length: about 0 minutes more" in line for line in told)
    assert set(result["failures"]) == {"one, strange, alone"}
    assert result["failures"]["one, strange, alone"].startswith("In trial 1 of 1: ")
    assert {row["setting"] for row in result["trial"]} == {f"{body}, alone" for body in bodies if body != "strange"}
    for concurrency in (1, 2):
        measured = [row for row in result["runs"] if row["concurrency"] == concurrency]
        assert len(measured) == 2 * 3, "two settings with PNGs and the one with raw pixels, in two rounds"
        assert sum(row["raw"] for row in measured) == 2
        assert all(row["seconds"] >= 0.2 for row in measured)
    assert {row["raw"] for row in result["best"]["PNG"]} == {False}
    fastest = {row["concurrency"]: row["per_second"] for row in result["best"]["any"]}
    assert all(row["per_second"] <= fastest[row["concurrency"]] for row in result["best"]["PNG"])
    assert result["settings_tried"] == 5
    assert 0 < result["minutes_taken"] < 1
