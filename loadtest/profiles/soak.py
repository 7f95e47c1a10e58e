"""Half an hour of a load that is meant to be held for good."""

from loadtest.profiles.limits import Limits, enforce
from loadtest.profiles.steps import Steps
from loadtest.profiles.users import BinaryUser, FileUser, JsonUser

__all__ = ["BinaryUser", "FileUser", "JsonUser"]


class Soak(Steps):
    """Thirty users, 300 images a second."""

    steps = ((1800, 30, 5),)


enforce(Limits(p99=500))
