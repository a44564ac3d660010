"""What is no method is refused with the names of what it lacks."""

import pytest

from vitrim.errors import ConfigError
from vitrim.method import METHOD, check_method


class Incomplete:
    levels = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    metric = "macs"
    granularity = "unit"

    def check(self, cost: object, target: object) -> None:
        """Accept everything."""


def test_missing_members_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Incomplete lacks scorer, plan"):
        check_method(Incomplete())
    with pytest.raises(ConfigError, match=", ".join(METHOD)):
        check_method(object())
