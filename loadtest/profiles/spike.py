"""Two minutes in the middle of which ten times as many users come at once; some may be refused, nobody may fail."""

from loadtest.profiles.limits import Limits, enforce
from loadtest.profiles.steps import Steps
from loadtest.profiles.users import BinaryUser, FileUser, JsonUser

__all__ = ["BinaryUser", "FileUser", "JsonUser"]


class Spike(Steps):
    """Twenty users, two hundred, and twenty again."""

    steps = ((30, 20, 20), (30, 200, 200), (60, 20, 20))


enforce(Limits(p99=3000, refused=0.5))
