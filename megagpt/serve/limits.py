"""Which clients may send requests, and how often."""

import hmac
import math
import time
from collections.abc import Sequence

from megagpt.serve.protocol import ApiError

MAX_CLIENTS = 10_000


class Clients:
    """API keys, and a token bucket per client: it holds a minute's requests and is refilled continuously."""

    def __init__(self, keys: Sequence[str], max_per_minute: float | None) -> None:
        self._keys, self._per_minute = [key.encode() for key in keys], max_per_minute
        self._buckets: dict[str, tuple[float, float]] = {}

    def admit(self, authorization: str | None, address: str, *, counted: bool) -> None:
        """Raise ApiError: 401 if keys are set and this one is not valid, 429 with Retry-After if the client is above the rate.

        counted: whether the request counts against the rate.
        """
        client = address
        if self._keys:
            scheme, _, given = (authorization or "").partition(" ")
            if scheme.lower() != "bearer" or not given:
                headers = {"WWW-Authenticate": "Bearer"}
                raise ApiError(
                    401, "an API key is expected: Authorization: Bearer KEY", code="missing_api_key", headers=headers
                )
            # Every key is compared, each in constant time, so that the time reveals nothing about the keys.
            matches = [hmac.compare_digest(key, given.strip().encode("utf-8", "replace")) for key in self._keys]
            if not any(matches):
                headers = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, "the API key is not valid here", code="invalid_api_key", headers=headers)
            client = f"key {matches.index(True)}"
        if counted and self._per_minute is not None:
            self._take(client, self._per_minute, time.monotonic())

    def _take(self, client: str, per_minute: float, now: float) -> None:
        most = max(1.0, per_minute)
        left, since = self._buckets.pop(client, (most, now))
        left = min(most, left + (now - since) * per_minute / 60)
        admitted = left >= 1
        self._buckets[client] = (left - 1 if admitted else left, now)
        while len(self._buckets) > MAX_CLIENTS:  # the least recent client: dicts keep the order of insertion
            del self._buckets[next(iter(self._buckets))]
        if not admitted:
            seconds = math.ceil((1 - left) * 60 / per_minute)
            message = f"more than {per_minute:g} requests per minute: try again in {seconds} s"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
