"""Half a minute of a few users: does everything answer, and soon?"""

from loadtest.profiles.limits import Limits, enforce
from loadtest.profiles.steps import Steps
from loadtest.profiles.users import BinaryUser, FileUser, JsonUser

__all__ = ["BinaryUser", "FileUser", "JsonUser"]


class Smoke(Steps):
    """Ten users."""

    steps = ((30, 10, 10),)


enforce(Limits(p99=250))
