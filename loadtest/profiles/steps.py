"""A load that goes in steps."""

from typing import ClassVar

from locust import LoadTestShape


class Steps(LoadTestShape):
    """Hold so many users for so long, one step after the other: (seconds, users, users started per second)."""

    abstract = True
    steps: ClassVar[tuple[tuple[float, int, float], ...]]

    def tick(self) -> tuple[int, float] | None:
        """Return the users of the present step, None after the last."""
        assert self.runner is not None, "Locust runs it"
        scale = self.runner.environment.parsed_options.time_scale
        left = self.get_run_time()
        for seconds, users, rate in self.steps:
            left -= seconds * scale
            if left < 0:
                return users, rate
        return None
