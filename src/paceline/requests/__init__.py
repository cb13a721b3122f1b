"""CHECK: the strict schema of a request, for `Pace.request` and for records made by hand.

Scalars and arrays of numpy and torch are accepted if they are exact: whole numbers of an integer
type, one-dimensional arrays of ids. A bool is not a number and 2.0 is not a whole number. Every
refusal is a RequestError that names the setting. Knows no target: the engine checks what depends on
one.
"""

from paceline.requests.settings import SETTINGS, RequestSettings, check_sampling, read_request
from paceline.requests.values import read_prompt

__all__ = ["SETTINGS", "RequestSettings", "check_sampling", "read_prompt", "read_request"]
