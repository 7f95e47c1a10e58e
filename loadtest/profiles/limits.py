"""What a load profile may show at worst, and the exit status that follows."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from locust import events
from locust.env import Environment

logger = logging.getLogger("loadtest")

REFUSED = "status 429"


@dataclass(frozen=True)
class Seen:
    """What a profile showed: requests sent, failures by what they say, and the p99 in milliseconds."""

    requests: int
    failures: Mapping[str, int]
    p99: float


@dataclass(frozen=True)
class Limits:
    """The most that p99 may be in milliseconds, and the largest shares of failures and of requests refused with 429."""

    p99: float
    failed: float = 0.0
    refused: float = 0.0

    def broken(self, seen: Seen) -> list[str]:
        """Return a sentence for each limit that is broken; that nothing was asked breaks one as well."""
        if not seen.requests:
            return ["Expected requests, but none was answered."]
        refused = seen.failures.get(REFUSED, 0)
        failed = sum(seen.failures.values()) - refused
        sentences = []
        if seen.p99 > self.p99:
            sentences.append(f"Expected a p99 of at most {self.p99:g} ms, measured {seen.p99:g} ms.")
        for what, count, share in (("failed", failed, self.failed), ("refused", refused, self.refused)):
            if count > share * seen.requests:
                told = f"{count} of {seen.requests}"
                sentences.append(f"Expected at most {100 * share:g} % of the requests {what}, but {told} were.")
        return sentences


def enforce(limits: Limits) -> None:
    """Let Locust exit 1 where a limit is broken, and 0 otherwise."""

    @events.quitting.add_listener
    def judge(environment: Environment, **_: object) -> None:
        p99 = environment.parsed_options.p99
        broken = (limits if p99 is None else replace(limits, p99=p99)).broken(_seen(environment))
        for sentence in broken:
            logger.error(sentence)
        environment.process_exit_code = 1 if broken else 0


def _seen(environment: Environment) -> Seen:
    total = environment.stats.total
    failures: dict[str, int] = {}
    for error in environment.stats.errors.values():
        told = str(error.error).removeprefix("CatchResponseError('").removesuffix("')")
        failures[told] = failures.get(told, 0) + error.occurrences
    return Seen(total.num_requests, failures, total.get_response_time_percentile(0.99))
